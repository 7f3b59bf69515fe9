"""Run an experiment: train what is missing, resume what was interrupted, evaluate, write the results."""

import os
import sys
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path
from typing import List, Sequence

from fairseq_hyperrouter.config import format_ints
from fairseq_hyperrouter.errors import UserError

from .experiment import Experiment
from .processes import Processes
from .progress import progress
from .provenance import PACKAGE, provenance
from .results import read_results, write_results
from .run_folder import STARTED, RunFolder


def run_experiment(
    experiment: Experiment,
    data: str,
    out: Path,
    *,
    jobs: int = 1,
    cpu: bool = False,
    command: str = "",
    against: Sequence[str] = (),
) -> int:
    """Do all that is not done yet and return how many runs failed.

    1. Every run has a folder in *out*. One that holds its results is done; one that holds a checkpoint goes on there.
    2. ``fairseq-train`` in a process of its own, *jobs* at a time, each with its share of the threads; then
       ``fairseq-hyperrouter sweep`` at the experts per token that the file names.
    3. After every run, and at the end: *out*/results.json, .md and .png of what is done, with the table's rows
       compared with each of those named in *against*.

    A run that fails is reported and the others go on. Whatever ends the runner, the next one continues; a training
    that outlives its runner is waited for, not started a second time.

    Raises:
        UserError (a ValueError): a folder that holds a run with other options.
    """
    if jobs < 1:
        raise UserError(f"--jobs {jobs}: must be at least 1")
    folders = [RunFolder(out, experiment, run) for run in experiment.runs]
    for folder in folders:
        folder.claim(data)
    failures: List[str] = []
    processes = Processes(threads=max(1, (os.cpu_count() or 1) // jobs))
    steps = _Steps(experiment, data, processes, cpu)
    with processes, progress(folders) as bar, ThreadPoolExecutor(jobs) as pool:
        futures = [pool.submit(steps.complete, folder) for folder in folders]
        try:
            for future in as_completed(futures):
                failure = future.result()
                if failure:
                    failures.append(failure)
                    bar.write(failure, file=bar.fp)
                write_results(experiment, read_results(folders), out, command, against)
        except BaseException:
            processes.end()
            pool.shutdown(wait=False, cancel_futures=True)
            raise
    return len(failures)


class _Steps:
    """What is done for every run."""

    def __init__(self, experiment: Experiment, data: str, processes: Processes, cpu: bool) -> None:
        self.experiment, self.data, self.processes = experiment, data, processes
        self.device = ["--cpu"] if cpu else []

    def complete(self, folder: RunFolder) -> str:
        """Do what is missing of the run; what went wrong, or nothing."""
        with folder.locked() as lock:
            if not folder.is_trained:
                # Started again, a finished training would make one more update.
                failure = "" if folder.has_ended_training else self._train(folder, lock)
                if failure:
                    return failure
                folder.keep_training()
            return "" if folder.is_evaluated else self._evaluate(folder, lock)

    def _train(self, folder: RunFolder, lock: int) -> str:
        folder.note_start(provenance(cpu=bool(self.device) or "--cpu" in folder.run.options))
        given = ["--user-dir", PACKAGE, "--save-dir", folder.path, "--seed", folder.run.seed, *self.device]
        defaults = ["--log-format", "json", "--log-interval", "20", "--no-epoch-checkpoints"]
        arguments = ["fairseq_cli.train", self.data, *defaults, *folder.run.options, *map(str, given)]
        return self._run(folder, arguments, folder.train_log, lock)

    def _evaluate(self, folder: RunFolder, lock: int) -> str:
        """A sweep that is cut short leaves what it has: only a whole one is kept."""
        checkpoint = folder.path / f"checkpoint_{self.experiment.checkpoint}.pt"
        if not checkpoint.exists():
            return (
                f"{folder.run.name}, seed {folder.run.seed}: {checkpoint} is gone; remove its folder to train it again"
            )
        where = ["--top-k", format_ints(folder.run.at), "--out", str(folder.unfinished_sweep), *self.device]
        sweep = ["fairseq_hyperrouter.commands", "sweep", str(checkpoint), self.data]
        failure = self._run(folder, [*sweep, *where, *self.experiment.evaluation], folder.sweep_log, lock)
        if not failure:
            folder.keep_evaluation()
        return failure

    def _run(self, folder: RunFolder, arguments: Sequence[str], log: Path, lock: int) -> str:
        """Run a Python module; what went wrong, or nothing."""
        with open(log, "a") as file:
            print(STARTED, file=file, flush=True)
            status = self.processes.run([sys.executable, "-m", *arguments], file, lock)
        if status == 0:
            return ""
        last = log.read_text(errors="replace").rpartition(STARTED)[2].strip().rpartition("\n")[2] or "ended"
        return f"{folder.run.name}, seed {folder.run.seed}: {last}   (exit status {status}, log: {log})"
