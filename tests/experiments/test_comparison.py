"""Rows against one of them, by hand."""

import pytest

from fairseq_hyperrouter.experiments.comparison import comparison

ROWS = {
    "base": {1: {1: 10.0, 2: 20.0, 3: 40.0}, 2: {1: 5.0}},
    "other": {1: {3: 44.0, 1: 9.0, 2: 20.0}, 2: {2: 5.0}, 4: {1: 3.0}},
    "dense": {None: {1: 5.5, 2: 10.0}},
}


def cells(text):
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in text.splitlines() if line[:1] == "|"]


def test_perplexity_in_percent_of_the_same_seeds():
    """10 % less, as much and 10 % more are 0 on average, whatever seed is named first; k = 2 have no seed in common."""
    found = comparison(ROWS, "base", "perplexity")
    assert found.startswith("Against base, in % of its perplexity, seed by seed: mean (least to most). Below 0 is ")
    head, _, *rest = cells(found)
    assert head == ["against base at k =", "1", "2", "4"]
    assert rest == [
        ["other", "+0.0 (-10.0 to +10.0)", "", ""],
        ["dense", "-47.5 (-50.0 to -45.0; seeds 1, 2)", "+10.0 (seed 1)", ""],
    ]


def test_against_a_model_without_experts():
    head, _, base, other = cells(comparison(ROWS, "dense", "perplexity"))
    assert head[0] == "against dense at k ="
    assert base == ["base", "+90.9 (+81.8 to +100.0; seeds 1, 2)", "-9.1 (seed 1)", ""]
    assert other == ["other", "+81.8 (+63.6 to +100.0; seeds 1, 2)", "-50.0 (seed 2)", "-45.5 (seed 1)"]


def test_models_without_experts_alone():
    dense = {"a": {None: {1: 10.0, 2: 10.0}}, "b": {None: {1: 9.0, 2: 11.0}}}
    assert cells(comparison(dense, "a", "perplexity"))[::2] == [
        ["against a at k =", ""],
        ["b", "+0.0 (-10.0 to +10.0)"],
    ]


def test_without_another_row():
    assert comparison({"base": ROWS["base"]}, "base", "perplexity") == ""


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_training_that_diverged(bad):
    rows = {"base": {1: {1: 2.0, 2: 2.0}}, "other": {1: {1: 1.0, 2: bad}}}
    for base, other in ("base", "other"), ("other", "base"):
        assert cells(comparison(rows, base, "perplexity"))[2] == [other, "nan"]


@pytest.mark.parametrize("metric", ["bits_per_character", "bits_per_token"])
def test_bits_as_they_are(metric):
    rows = {"base": {1: {1: 2.0, 2: 2.0}}, "other": {1: {1: 2.25, 2: 1.9994}}}
    found = comparison(rows, "base", metric)
    assert found.startswith(f"Against base, in {metric.replace('_', ' ')}, ")
    assert cells(found)[2] == ["other", "+0.125 (-0.001 to +0.250)"]
