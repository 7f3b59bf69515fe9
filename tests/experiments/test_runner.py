"""What counts as done. Whole experiments: tests/end_to_end/test_experiment.py."""

import fcntl
import json
from dataclasses import replace
from pathlib import Path

import pytest

from fairseq_hyperrouter import UserError
from fairseq_hyperrouter.experiments.experiment import Experiment, Run
from fairseq_hyperrouter.experiments.runner import OPTIONS, SWEEP, _check_folder, _Workers

RUN = Run("smoe", "smoe", 1, (1, 8), ("--lr", "0.1"), 3)


def test_an_evaluation_counts_when_it_is_whole(tmp_path, monkeypatch):
    """A sweep that fails, or is interrupted, writes down what it has."""
    folder = tmp_path / RUN.folder
    folder.mkdir()
    (folder / "logged.json").write_text("{}")
    workers = _Workers(Experiment("", "", "perplexity", (), "last", None, (), (RUN,)), "data", tmp_path, 1, True)
    rows, failures = [{"top_k": 1}], ["cut short", ""]

    def sweep(self, run, arguments, log, lock):
        out = Path(arguments[arguments.index("--out") + 1])
        out.mkdir(exist_ok=True)
        for name in (SWEEP, "sweep.png"):
            (out / name).write_text(json.dumps(rows))
        return failures.pop(0)

    monkeypatch.setattr(_Workers, "_run", sweep)
    assert workers.complete(RUN) == "cut short"
    assert not (folder / SWEEP).exists()
    rows.append({"top_k": 8})
    assert workers.complete(RUN) == ""
    assert json.loads((folder / SWEEP).read_text()) == rows and (folder / "sweep.png").exists()
    assert workers.complete(RUN) == "" and not failures


def test_other_options_are_refused_where_a_training_has_begun(tmp_path):
    """One that failed before its first checkpoint, as at an option that does not exist, has nothing to lose."""
    experiment, other = (
        Experiment("", "", "perplexity", (), "last", None, (), (RUN,)),
        replace(RUN, options=("--lr", "9")),
    )
    for run in (RUN, other, RUN):
        _check_folder(tmp_path, run, experiment, "data")
        assert json.loads((tmp_path / OPTIONS).read_text())["arguments"] == list(run.options)
    with open(tmp_path / "lock") as lock:  # a training holds it
        fcntl.flock(lock, fcntl.LOCK_EX)
        with pytest.raises(UserError, match=r"holds a run with other options \(--lr 0.1, --lr 9\)"):
            _check_folder(tmp_path, other, experiment, "data")
    (tmp_path / "checkpoint_1_500.pt").touch()
    with pytest.raises(UserError, match="holds a run with other options"):
        _check_folder(tmp_path, other, experiment, "data")
    _check_folder(tmp_path, RUN, experiment, "data")
