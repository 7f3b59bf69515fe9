"""Which checkpoints are evaluated, and what they are called."""

from pathlib import Path

import numpy as np
import pytest

from fairseq_hyperrouter import UserError
from fairseq_hyperrouter.analysis import evaluation
from fairseq_hyperrouter.analysis.evaluation import every_nth, labels


@pytest.mark.parametrize(
    "paths, expected",
    [
        (["runs/a/checkpoint_best.pt", "runs/b/checkpoint_best.pt"], ["a", "b"]),
        (["runs/a/checkpoint_best.pt", "runs/a/checkpoint_last.pt"], ["a/checkpoint_best", "a/checkpoint_last"]),
        (["a/seed1/last.pt", "b/seed1/last.pt"], ["a/seed1/last", "b/seed1/last"]),
        (["/x/1/a/best.pt", "/y/1/a/best.pt", "/y/1/b/best.pt"], ["x/1/a/best", "y/1/a/best", "y/1/b/best"]),
        (["runs/a/last.pt", "runs/a/last.pt"], ["a", "a (2)"]),
        (["runs/a/last.pt", "runs/b/last.pt", "runs/../runs/a/last.pt"], ["a", "b", "a (2)"]),
        (["runs/a/best.pt", "runs/a/last.pt", "runs/a/last.pt"], ["a/best", "a/last", "a/last (2)"]),
    ],
)
def test_labels_tell_checkpoints_apart(paths, expected):
    assert labels([Path(path) for path in paths]) == expected


def test_a_missing_checkpoint_is_noticed_before_any_is_loaded(tmp_path, monkeypatch):
    there, missing = tmp_path / "there.pt", tmp_path / "missing.pt"
    there.touch()
    loaded = []
    monkeypatch.setattr(evaluation, "Evaluator", lambda path, *_, **__: loaded.append(path))
    with pytest.raises(UserError, match=r"CHECKPOINT .*missing\.pt: no such file"):
        list(evaluation.evaluators([there, missing], "data"))
    assert not loaded
    list(evaluation.evaluators([there, there], "data"))
    assert loaded == [there, there]


@pytest.mark.parametrize("samples, every", [(100, 1), (600, 2), (2_000, 7)])
def test_about_so_many_tokens(samples, every):
    """Also of a split with more tokens than its sizes' type can count."""
    assert every_nth(np.full(samples, 100, dtype=np.uint16), 30_000) == every
