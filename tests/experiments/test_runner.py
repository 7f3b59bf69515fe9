"""What is done of a run, and in which order. Whole experiments: tests/end_to_end/test_experiment.py."""

import json
from dataclasses import replace
from pathlib import Path

import pytest

from fairseq_hyperrouter import UserError
from fairseq_hyperrouter.experiments import Experiment, Run, run_experiment
from fairseq_hyperrouter.experiments.processes import Processes
from fairseq_hyperrouter.experiments.results import read_results
from fairseq_hyperrouter.experiments.run_folder import LOGGED, SWEEP, RunFolder
from fairseq_hyperrouter.experiments.runner import _Steps

RUN = Run("smoe", "smoe", 1, (1, 8), ("--lr", "0.1"), 3)
EXPERIMENT = Experiment("", "", "perplexity", (), "last", None, (), (RUN,))


class Sweeps(Processes):
    """Sweeps that write their rows, and end with the next of *statuses*."""

    def __init__(self, *statuses):
        super().__init__(threads=1)
        self.statuses, self.rows = list(statuses), []

    def run(self, arguments, log, inherited):
        out = Path(arguments[arguments.index("--out") + 1])
        out.mkdir(exist_ok=True)
        for name in (SWEEP, "sweep.png"):
            (out / name).write_text(json.dumps(self.rows))
        print("cut short", file=log, flush=True)
        return self.statuses.pop(0)


def test_an_evaluation_counts_when_it_is_whole(tmp_path):
    """A sweep that fails, or is interrupted, writes down what it has."""
    folder = RunFolder(tmp_path, EXPERIMENT, RUN)
    folder.claim("data")
    (folder.path / LOGGED).write_text("{}")
    (folder.path / "checkpoint_last.pt").touch()
    sweeps = Sweeps(1, 0)
    steps = _Steps(EXPERIMENT, "data", sweeps, cpu=True)
    sweeps.rows.append({"top_k": 1})
    assert steps.complete(folder).startswith("smoe, seed 1: cut short   (exit status 1, log: ")
    assert not folder.is_evaluated
    sweeps.rows.append({"top_k": 8})
    assert steps.complete(folder) == ""
    assert folder.read(SWEEP) == sweeps.rows and (folder.path / "sweep.png").exists()
    assert steps.complete(folder) == "" and not sweeps.statuses


def test_an_evaluation_is_kept_until_the_next_is_whole(tmp_path):
    """It counts no more where the file says otherwise now, and again where the file is as it was."""
    folder = RunFolder(tmp_path, EXPERIMENT, RUN)
    folder.claim("data")
    (folder.path / LOGGED).write_text("{}")
    (folder.path / "checkpoint_last.pt").touch()
    sweeps = Sweeps(0, 1, 0)
    steps = _Steps(EXPERIMENT, "data", sweeps, cpu=True)
    before = sweeps.rows = [{"top_k": 1}, {"top_k": 8}]
    assert steps.complete(folder) == ""
    changed = RunFolder(tmp_path, EXPERIMENT, replace(RUN, at=(1, 2)))
    changed.claim("data")
    sweeps.rows = [{"top_k": 1}, {"top_k": 2}]
    assert "cut short" in steps.complete(changed)
    assert changed.read(SWEEP) == before
    assert read_results([changed]) == [] and [one.sweep for one in read_results([folder])] == [before]
    folder.claim("data")
    assert steps.complete(folder) == ""
    changed.claim("data")
    assert steps.complete(changed) == "" and changed.read(SWEEP) == sweeps.rows
    assert changed.is_evaluated and not folder.is_evaluated and not sweeps.statuses


def test_an_evaluation_of_an_older_training_does_not_count(tmp_path):
    """Of one whose checkpoints somebody took away."""
    folder = RunFolder(tmp_path, EXPERIMENT, RUN)
    folder.claim("data")
    (folder.path / SWEEP).write_text("[]")
    (folder.path / "checkpoint_last.pt").touch()
    folder.train_log.write_text("done training in 3 seconds")
    steps = _Steps(EXPERIMENT, "data", Sweeps(1), cpu=True)
    assert "cut short" in steps.complete(folder) and not folder.is_evaluated


def test_a_checkpoint_that_is_gone(tmp_path):
    """It says what to do: whoever removes checkpoints to save room may not want them trained again."""
    folder = RunFolder(tmp_path, EXPERIMENT, RUN)
    folder.claim("data")
    (folder.path / LOGGED).write_text("{}")
    said = _Steps(EXPERIMENT, "data", Sweeps(), cpu=True).complete(folder)
    path = folder.path / "checkpoint_last.pt"
    assert said == f"smoe, seed 1: {path} is gone; remove its folder to train it again"


def test_a_process_that_is_killed_without_a_word(tmp_path):
    folder = RunFolder(tmp_path, EXPERIMENT, RUN)
    folder.claim("data")

    class Killed(Processes):
        def run(self, arguments, log, inherited):
            return -9

    said = _Steps(EXPERIMENT, "data", Killed(threads=1), cpu=True).complete(folder)
    assert said == f"smoe, seed 1: ended   (exit status -9, log: {folder.train_log})"


def test_mistakes(tmp_path):
    with pytest.raises(UserError, match="--jobs 0: must be at least 1"):
        run_experiment(EXPERIMENT, "data", tmp_path, jobs=0)
