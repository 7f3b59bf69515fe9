"""What a run's folder says is done, and what is refused."""

import fcntl
from dataclasses import replace

import pytest

from fairseq_hyperrouter import UserError
from fairseq_hyperrouter.experiments import Experiment, Run
from fairseq_hyperrouter.experiments.run_folder import LOGGED, OPTIONS, STARTED, TRAINED, RunFolder

RUN = Run("smoe", "smoe", 1, (1, 8), ("--lr", "0.1"), 9)
EXPERIMENT = Experiment("", "", "perplexity", (), "last", None, (), (RUN,))


def test_other_options_are_refused_where_a_training_has_begun(tmp_path):
    """One that failed before its first checkpoint, as at an option that does not exist, has nothing to lose."""
    this, other = (RunFolder(tmp_path, EXPERIMENT, run) for run in (RUN, replace(RUN, options=("--lr", "9"))))
    for folder in (this, other, this):
        folder.claim("data")
        assert folder.read(OPTIONS)["arguments"] == list(folder.run.options)
    with open(this.path / "lock") as lock:  # a training holds it
        fcntl.flock(lock, fcntl.LOCK_EX)
        with pytest.raises(UserError, match=r"holds a run with other options \(--lr 0.1, --lr 9\)"):
            other.claim("data")
    (this.path / "checkpoint_1_500.pt").touch()
    with pytest.raises(UserError, match="holds a run with other options"):
        other.claim("data")
    with pytest.raises(UserError, match=r"holds a run with other options \(data .*data, data .*else\)"):
        this.claim("else")
    this.claim("data")


def test_how_far_a_training_is(tmp_path):
    """Saved by its checkpoints; done by the log of the newest start, of which a crash may be the end."""
    folder = RunFolder(tmp_path, EXPERIMENT, RUN)
    folder.claim("data")
    assert (folder.updates_saved(), folder.updates_done()) == (0, 0)
    for name in ("checkpoint_1_2.pt", "checkpoint_1_4.pt", "checkpoint_last.pt"):
        (folder.path / name).touch()
    folder.train_log.write_text(f'{STARTED}\n | train_inner | {{"num_updates": "7"}}\n')
    assert (folder.updates_saved(), folder.updates_done()) == (4, 7)
    with open(folder.train_log, "a") as log:
        log.write(f'{STARTED}\n | train | {{"num_updates": "9", "train_wps": "12.5", "x": null}}\n')
    assert folder.updates_done() == 9 and not folder.has_ended_training
    with open(folder.train_log, "a") as log:
        log.write(" | done training in 3 seconds\n")
    assert folder.has_ended_training and not folder.is_trained
    folder.keep_training()
    assert folder.is_trained and folder.read(LOGGED) == {"num_updates": 9, "train_wps": 12.5}


def test_what_trained_it(tmp_path):
    """A training that starts from the beginning has nothing of one that failed before its first checkpoint."""
    folder = RunFolder(tmp_path, EXPERIMENT, RUN)
    folder.claim("data")
    assert folder.trained_by == []
    one, other = {"commit": "1"}, {"commit": "2"}
    for provenance, expected in ((other, [other]), (one, [one]), (one, [one])):
        folder.note_start(provenance)
        assert folder.trained_by == expected
    (folder.path / "checkpoint_last.pt").touch()
    for provenance, expected in ((one, [one]), (other, [one, other]), (one, [one, other])):
        folder.note_start(provenance)
        assert folder.trained_by == expected
    (folder.path / TRAINED).unlink()  # as an older version leaves it
    folder.note_start(one)
    assert folder.trained_by == []
