"""The table and files of results, from hand-made ones."""

import json

import pytest

from fairseq_hyperrouter.experiments.experiment import Experiment, Run
from fairseq_hyperrouter.experiments.results import Result, markdown, write_results


def result(name, seed, perplexities, row=None, **logged):
    run = Run(name, row or name, seed, tuple(perplexities), ("--lr", "1"), 9)
    sweep = [{"top_k": k, "perplexity": p, "checkpoint": "x/checkpoint_last.pt"} for k, p in perplexities.items()]
    return Result(run, sweep, logged)


RESULTS = [
    result("a", 1, {1: 20.0, 2: 11.0}, train_wps=1000.0),
    result("a", 2, {1: 22.0, 2: 11.0}, train_wps=2000.0),
    result("b at 1", 1, {1: 9.5}, row="b"),
    result("b at 2", 1, {2: 9.0}, row="b"),
    result("dense", 1, {None: 12.25}),
]
EXPERIMENT = Experiment("A title", "small", "perplexity", ("train_wps",), "last", None, (), ())


def test_table():
    """Means of seeds with their sample standard deviation; runs of one row together; a dense model has one number."""
    about, command, table = markdown(EXPERIMENT, RESULTS, "the command").split("\n\n")
    assert about.startswith("**A title** (small; seeds 1, 2; 9 updates; ") and command == "`the command`"
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in table.splitlines()]
    assert cells[0] == ["perplexity at k =", "1", "2", "training tokens/s"]
    assert cells[2:] == [
        ["a", "21.00 ± 1.41", "11.00 ± 0.00", "1,500 ± 707"],
        ["b", "9.500", "9.000", ""],
        ["dense", "12.25 (dense)", "", ""],
    ]


def test_table_of_dense_models_alone():
    """As long as nothing else is done."""
    table = markdown(EXPERIMENT, RESULTS[-1:], "").split("\n\n")[-1]
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in table.splitlines()]
    assert cells[0] == ["perplexity at k =", "", "training tokens/s"] and cells[2] == ["dense", "12.25 (dense)", ""]


@pytest.mark.parametrize("which", [RESULTS, RESULTS[-1:]], ids=["all", "dense alone"])
def test_files(tmp_path, which):
    paths = write_results(EXPERIMENT, which, tmp_path, "the command")
    assert [path.name for path in paths] == ["results.json", "results.md", "results.png"]
    written = json.loads(paths[0].read_text())
    assert [run["name"] for run in written["runs"]] == [one.run.name for one in which]
    assert written["runs"][0]["sweep"][0]["checkpoint"] == "checkpoint_last.pt"
    assert "/" not in json.dumps(written["runs"])
    assert paths[2].read_bytes().startswith(b"\x89PNG")
    assert write_results(EXPERIMENT, [], tmp_path / "none", "") == []
