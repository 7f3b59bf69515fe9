"""Run an experiment: train what is missing, resume what was interrupted, evaluate, write the results."""

import contextlib
import fcntl
import json
import os
import re
import signal
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path
from typing import Any, Dict, Iterator, List, Sequence

from tqdm import tqdm

from fairseq_hyperrouter.config import format_ints
from fairseq_hyperrouter.errors import UserError

from .experiment import Experiment, Run
from .results import Result, write_results

USER_DIR = Path(__file__).parents[1]
OPTIONS, LOGGED, SWEEP = "options.json", "logged.json", "sweep.json"
EVALUATED_BY = ("at", "evaluation", "checkpoint")
"""What of options.json an evaluation depends on, and a training does not."""
STARTED, DONE = "# started by fairseq-hyperrouter experiment", "done training in"


def run_experiment(
    experiment: Experiment, data: str, out: Path, *, jobs: int = 1, cpu: bool = False, command: str = ""
) -> int:
    """Do all that is not done yet and return how many runs failed.

    1. Every run has a folder in *out*. One that holds its results is done; one that holds a checkpoint goes on there.
    2. ``fairseq-train`` in a process of its own, *jobs* at a time, each with its share of the threads; then
       ``fairseq-hyperrouter sweep`` at the experts per token that the file names.
    3. After every run, and at the end: *out*/results.json, .md and .png of what is done.

    A run that fails is reported and the others go on. Whatever ends the runner, the next one continues; a training
    that outlives its runner is waited for, not started a second time.

    Raises:
        UserError (a ValueError): a folder that holds a run with other options.
    """
    if jobs < 1:
        raise UserError(f"--jobs {jobs}: must be at least 1")
    for run in experiment.runs:
        _check_folder(out / run.folder, run, experiment, data)
    workers = _Workers(experiment, data, out, threads=max(1, (os.cpu_count() or 1) // jobs), cpu=cpu)
    failures: List[str] = []
    with workers.ended_with_this(), _progress(experiment.runs, out) as bar, ThreadPoolExecutor(jobs) as pool:
        futures = {pool.submit(workers.complete, run): run for run in experiment.runs}
        try:
            for future in as_completed(futures):
                failure = future.result()
                if failure:
                    failures.append(failure)
                    bar.write(failure, file=sys.stderr)
                write_results(experiment, results(experiment, out), out, command)
        except BaseException:
            workers.end()
            pool.shutdown(wait=False, cancel_futures=True)
            raise
    return len(failures)


def results(experiment: Experiment, out: Path) -> List[Result]:
    """What the runs that are done came to."""
    found = []
    for run in experiment.runs:
        folder = out / run.folder
        if (folder / SWEEP).exists():
            logged = json.loads((folder / LOGGED).read_text())
            found.append(Result(run, json.loads((folder / SWEEP).read_text()), logged))
    return found


def _check_folder(folder: Path, run: Run, experiment: Experiment, data: str) -> None:
    """Write down the run's options; a UserError where it was trained with others, if only to its first checkpoint.

    Where it was evaluated otherwise, that result is removed, and the run will be evaluated anew.
    """
    options = {"data": str(Path(data).resolve()), "at": list(run.at), "arguments": list(run.options)}
    options.update(evaluation=list(experiment.evaluation), checkpoint=experiment.checkpoint)
    file = folder / OPTIONS
    if not file.exists():
        folder.mkdir(parents=True, exist_ok=True)
        _write(file, options)
        return
    before = json.loads(file.read_text())
    changed = sorted(set(_pairs(before)) ^ set(_pairs(options)))
    if changed and _has_begun(folder):
        raise UserError(f"{folder}: holds a run with other options ({', '.join(changed)}): move it, or give --out")
    if changed or any(before.get(name) != options[name] for name in EVALUATED_BY):
        (folder / SWEEP).unlink(missing_ok=True)
        _write(file, options)


def _has_begun(folder: Path) -> bool:
    """Whether there is a training, running or saved, that other options would make worthless."""
    with open(folder / "lock", "w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            return True
    return (folder / LOGGED).exists() or any(folder.glob("checkpoint*.pt"))


def _pairs(options: Dict[str, Any]) -> List[str]:
    text = " ".join(options["arguments"])
    return [f"data {options['data']}", *(f"--{part.strip()}" for part in text.split("--") if part.strip())]


def _write(path: Path, content: Any) -> None:
    """A file that is there is whole."""
    unfinished = path.with_name(path.name + ".unfinished")
    unfinished.write_text(json.dumps(content, indent=1) + "\n")
    unfinished.replace(path)


class _Ended(Exception):
    """The runner is ending."""


class _Workers:
    """The processes of the runs that are being worked on."""

    def __init__(self, experiment: Experiment, data: str, out: Path, threads: int, cpu: bool) -> None:
        self.experiment, self.data, self.out, self.cpu = experiment, data, out, cpu
        self.environment = {"OMP_NUM_THREADS": str(threads), "PYTHONWARNINGS": "ignore", **os.environ}
        self.processes: List[subprocess.Popen] = []
        self.lock = threading.Lock()
        self.ending = False

    def complete(self, run: Run) -> str:
        """Do what is missing of *run*; what went wrong, or nothing."""
        folder = self.out / run.folder
        with open(folder / "lock", "w") as lock:
            # The training inherits the lock, and holds it as long as it lives.
            fcntl.flock(lock, fcntl.LOCK_EX)
            log = folder / "train.log"
            if not (folder / LOGGED).exists():
                # Started again, a finished training would make one more update.
                if DONE not in _since_start(log):
                    failure = self._run(run, self._training(run), log, lock.fileno())
                    if failure:
                        return failure
                _write(folder / LOGGED, _last_logged(log.read_text(errors="replace")))
            if not (folder / SWEEP).exists():
                return self._evaluate(run, lock.fileno())
        return ""

    def _evaluate(self, run: Run, lock: int) -> str:
        """A sweep that was cut short leaves what it had: only a whole one is moved to where it counts."""
        folder, unfinished = self.out / run.folder, self.out / run.folder / "sweep"
        failure = self._run(run, self._evaluation(run, unfinished), folder / "sweep.log", lock)
        if not failure:
            for file in sorted(unfinished.iterdir(), key=lambda file: file.name == SWEEP):
                file.replace(folder / file.name)
            unfinished.rmdir()
        return failure

    def _training(self, run: Run) -> List[str]:
        device = ["--cpu"] if self.cpu else []
        given = ["--user-dir", USER_DIR, "--save-dir", self.out / run.folder, "--seed", run.seed, *device]
        defaults = ["--log-format", "json", "--log-interval", "20", "--no-epoch-checkpoints"]
        return [sys.executable, "-m", "fairseq_cli.train", self.data, *defaults, *run.options, *map(str, given)]

    def _evaluation(self, run: Run, out: Path) -> List[str]:
        checkpoint = self.out / run.folder / f"checkpoint_{self.experiment.checkpoint}.pt"
        where = ["--top-k", format_ints(run.at), "--out", str(out), *(["--cpu"] if self.cpu else [])]
        command = [sys.executable, "-m", "fairseq_hyperrouter.commands", "sweep", str(checkpoint), self.data]
        return [*command, *where, *self.experiment.evaluation]

    def _run(self, run: Run, arguments: Sequence[str], log: Path, lock: int) -> str:
        with open(log, "a") as file:
            print(STARTED, file=file, flush=True)
            with self.lock:
                if self.ending:
                    raise _Ended
                process = subprocess.Popen(
                    arguments,
                    env=self.environment,
                    stdin=subprocess.DEVNULL,
                    stdout=file,
                    stderr=subprocess.STDOUT,
                    pass_fds=(lock,),
                )
                self.processes.append(process)
            status = process.wait()
        if status == 0:
            return ""
        if self.ending:
            raise _Ended
        lines = log.read_text(errors="replace").strip().splitlines() or [""]
        return f"{run.name}, seed {run.seed}: {lines[-1]}   (exit status {status}, log: {log})"

    def end(self) -> None:
        with self.lock:
            self.ending = True
            for process in self.processes:
                if process.poll() is None:
                    process.terminate()

    @contextlib.contextmanager
    def ended_with_this(self) -> Iterator[None]:
        """A runner that is told to end ends its trainings."""

        def on_signal(number: int, _: Any) -> None:
            raise SystemExit(128 + number)

        before = signal.signal(signal.SIGTERM, on_signal)
        try:
            yield
        finally:
            signal.signal(signal.SIGTERM, before)


def _last_logged(log: str) -> Dict[str, float]:
    """What ``--log-format json`` printed last of every metric, in numbers."""
    logged: Dict[str, Any] = {}
    for line in re.findall(r"\| (?:train|valid) \| (\{.*\})", log):
        logged.update(json.loads(line))
    return {name: float(value) for name, value in logged.items() if value is not None}


@contextlib.contextmanager
def _progress(runs: Sequence[Run], out: Path) -> Iterator[tqdm]:
    """A bar of the updates of all runs; tqdm tells the time left."""
    done = {run: _updates_saved(run, out) for run in runs}
    ended = threading.Event()
    with tqdm(total=sum(run.updates for run in runs), initial=sum(done.values()), unit="update", miniters=1) as bar:

        def watch() -> None:
            while not ended.wait(1.0):
                for run in runs:
                    now = _updates_done(run, out)
                    bar.update(max(0, now - done[run]))
                    done[run] = max(now, done[run])
                bar.set_postfix_str(f"{sum((out / run.folder / SWEEP).exists() for run in runs)}/{len(runs)} runs done")

        watcher = threading.Thread(target=watch, daemon=True)
        watcher.start()
        try:
            yield bar
        finally:
            ended.set()
            watcher.join()


def _updates_saved(run: Run, out: Path) -> int:
    """Where a training goes on."""
    if (out / run.folder / LOGGED).exists():
        return run.updates
    names = [path.stem.split("_")[-1] for path in (out / run.folder).glob("checkpoint_*_*.pt")]
    return max((int(name) for name in names if name.isdecimal()), default=0)


def _updates_done(run: Run, out: Path) -> int:
    """Where a training is, by its log."""
    if (out / run.folder / LOGGED).exists():
        return run.updates
    found = re.findall(r'num_updates": "(\d+)"', _since_start(out / run.folder / "train.log"))
    return min(int(found[-1]), run.updates) if found else 0


def _since_start(log: Path) -> str:
    """The end of what the newest training wrote."""
    if not log.exists():
        return ""
    with open(log, errors="replace") as file:
        file.seek(max(0, os.path.getsize(log) - 5000))
        return file.read().rpartition(STARTED)[2]
