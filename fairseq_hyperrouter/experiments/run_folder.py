"""What a run's folder holds, how far the run is, and what of it still counts.

options.json                what it was trained with, and how it was evaluated
trained.json                what trained it: its ``provenance``, several where it went on elsewhere
train.log, checkpoint*.pt   of fairseq-train
logged.json                 what the training logged last; there when it is done
sweep.json, .md, .png       of ``fairseq-hyperrouter sweep``; there when it is whole
sweep.log, sweep/           of one that is not done
lock                        held by what trains or evaluates, also when its runner is gone
"""

import contextlib
import fcntl
import json
import os
import re
from pathlib import Path
from typing import Any, Dict, Iterator, List

from fairseq_hyperrouter.errors import UserError

from .experiment import Experiment, Run

OPTIONS, TRAINED, LOGGED, SWEEP = "options.json", "trained.json", "logged.json", "sweep.json"
STARTED, DONE = "# started by fairseq-hyperrouter experiment", "done training in"


class RunFolder:
    """The folder of a *run* in *out*, the folder of its experiment."""

    def __init__(self, out: Path, experiment: Experiment, run: Run) -> None:
        self.run, self.path = run, out / run.folder
        self.train_log, self.sweep_log = self.path / "train.log", self.path / "sweep.log"
        self.unfinished_sweep = self.path / "sweep"
        self.evaluation = {
            "at": list(run.at),
            "evaluation": list(experiment.evaluation),
            "checkpoint": experiment.checkpoint,
        }

    def claim(self, data: str) -> None:
        """Write down the run's options.

        Raises:
            UserError (a ValueError): it was trained with others, if only to its first checkpoint.
        """
        training = {"data": str(Path(data).resolve()), "arguments": list(self.run.options)}
        self.path.mkdir(parents=True, exist_ok=True)
        if self._holds(OPTIONS):
            changed = sorted(set(_pairs(self.read(OPTIONS))) ^ set(_pairs(training)))
            if not changed:
                return
            if self._has_begun():
                raise UserError(
                    f"{self.path}: holds a run with other options ({', '.join(changed)}): move it, or give --out"
                )
        self._write(OPTIONS, {**training, **self.evaluation})

    @contextlib.contextmanager
    def locked(self) -> Iterator[int]:
        """Wait until nobody works in this folder; the lock's file descriptor.

        A process that inherits it holds the lock as long as it lives.
        """
        with open(self.path / "lock", "w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            yield lock.fileno()

    @property
    def is_trained(self) -> bool:
        return self._holds(LOGGED)

    @property
    def is_evaluated(self) -> bool:
        """Whether it is done: trained, and evaluated as the experiment says now."""
        if not self.is_trained:
            return False
        options = self.read(OPTIONS)
        # In this order: when the options are these, the sweep of others is gone.
        return all(options.get(name) == value for name, value in self.evaluation.items()) and self._holds(SWEEP)

    @property
    def has_ended_training(self) -> bool:
        """Whether fairseq-train came to its end, by its log."""
        return DONE in self._newest_log()

    def note_start(self, provenance: Dict[str, Any]) -> None:
        """Write down what trains it from here on: from its last checkpoint, or from the beginning."""
        if self._has_checkpoint() and not self._holds(TRAINED):  # begun by a version that did not write it down
            return
        before = self.trained_by if self._has_checkpoint() else []
        self._write(TRAINED, before if provenance in before else [*before, provenance])

    @property
    def trained_by(self) -> List[Dict[str, Any]]:
        """The ``provenance`` of its training, several where it went on elsewhere; none where nobody wrote it down."""
        return self.read(TRAINED) if self._holds(TRAINED) else []

    def keep_training(self) -> None:
        """From here on it is trained; what was evaluated of a training before it is worthless."""
        (self.path / SWEEP).unlink(missing_ok=True)
        self._write(LOGGED, _last_logged(self.train_log.read_text(errors="replace")))

    def keep_evaluation(self) -> None:
        """Put the sweep that is done in the place of an older one."""
        (self.path / SWEEP).unlink(missing_ok=True)
        self._write(OPTIONS, {**self.read(OPTIONS), **self.evaluation})
        for file in sorted(self.unfinished_sweep.iterdir(), key=lambda file: file.name == SWEEP):
            file.replace(self.path / file.name)
        self.unfinished_sweep.rmdir()

    def updates_saved(self) -> int:
        """Where a training goes on."""
        if self.is_trained:
            return self.run.updates
        names = [path.stem.split("_")[-1] for path in self.path.glob("checkpoint_*_*.pt")]
        return max((int(name) for name in names if name.isdecimal()), default=0)

    def updates_done(self) -> int:
        """Where a training is, by its log."""
        if self.is_trained:
            return self.run.updates
        found = re.findall(r'num_updates": "(\d+)"', self._newest_log())
        return min(int(found[-1]), self.run.updates) if found else 0

    def read(self, name: str) -> Any:
        """The content of one of the JSON files."""
        return json.loads((self.path / name).read_text())

    def _holds(self, name: str) -> bool:
        return (self.path / name).exists()

    def _write(self, name: str, content: Any) -> None:
        """A file that is there is whole."""
        unfinished = self.path / f"{name}.unfinished"
        unfinished.write_text(json.dumps(content, indent=1) + "\n")
        unfinished.replace(self.path / name)

    def _has_begun(self) -> bool:
        """Whether there is a training, running or saved, that other options would make worthless."""
        with open(self.path / "lock", "w") as lock:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError:
                return True
        return self.is_trained or self._has_checkpoint()

    def _has_checkpoint(self) -> bool:
        return any(self.path.glob("checkpoint*.pt"))

    def _newest_log(self) -> str:
        """The end of what the newest training wrote."""
        if not self.train_log.exists():
            return ""
        with open(self.train_log, errors="replace") as file:
            file.seek(max(0, os.path.getsize(self.train_log) - 5000))
            return file.read().rpartition(STARTED)[2]


def _pairs(options: Dict[str, Any]) -> List[str]:
    text = " ".join(options["arguments"])
    return [f"data {options['data']}", *(f"--{part.strip()}" for part in text.split("--") if part.strip())]


def _last_logged(log: str) -> Dict[str, float]:
    """What ``--log-format json`` printed last of every metric, in numbers."""
    logged: Dict[str, Any] = {}
    for line in re.findall(r"\| (?:train|valid) \| (\{.*\})", log):
        logged.update(json.loads(line))
    return {name: float(value) for name, value in logged.items() if value is not None}
