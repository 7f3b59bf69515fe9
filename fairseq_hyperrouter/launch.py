"""Start several workers of one fairseq command on the CPUs of this machine; stock fairseq starts none there."""

import contextlib
import ctypes
import os
import random
import signal
import socket
import subprocess
import sys
import tempfile
import time
from contextlib import ExitStack
from pathlib import Path
from typing import IO, List, Optional, Sequence

from .errors import UserError

PATIENCE = 15.0
"""Seconds that workers get to end by themselves after one of them has ended badly."""
_LIBC = ctypes.CDLL(None) if sys.platform == "linux" else None
_PR_SET_PDEATHSIG = 1


def launch(workers: int, command: Sequence[str], patience: float = PATIENCE) -> int:
    """Run *command* as worker 0 .. *workers* - 1 and return its exit status, 0 when all ended well.

    1. Start every worker with fairseq's options for its rank, gloo, legacy_ddp and ``--cpu``. Each gets its share of
       the threads, unless OMP_NUM_THREADS says how many.
    2. Show what worker 0 prints; of another, its last words when it was the first to end badly.
    3. When one ends badly, the others lose their connection to it and end too; after *patience* seconds those that
       have not are stopped. When this process is killed, Linux ends its workers.

    Raises:
        UserError (a ValueError): no worker, or a command that does not exist.
    """
    if workers < 1:
        raise UserError(f"launch {workers}: must be at least 1 worker")
    command = list(command[1:] if command[0] == "--" else command)
    name = Path(command[0]).name
    if name in ("fairseq-generate", "fairseq-interactive"):
        raise UserError(f"launch {command[0]}: each worker would print the sentences of its share; start one process")
    given = {option.partition("=")[0].lstrip("-+") for option in command if option[:1] in ("-", "+") or "=" in option}
    for option in sorted(given):
        if option.startswith(("distributed-", "distributed_training.distributed_")):
            raise UserError(f"launch: gives {option} itself, leave it out")
    shared = worker_options(workers, free_port(), hydra="hydra" in name)
    if "ddp-backend" in given:
        at = shared.index("--ddp-backend")
        del shared[at : at + 2]
    if "distributed_training.ddp_backend" in given:
        shared.remove("distributed_training.ddp_backend=legacy_ddp")
    environment = {"OMP_NUM_THREADS": str(max(1, (os.cpu_count() or 1) // workers)), **os.environ}
    with ExitStack() as stack:
        logs: List[IO[str]] = [stack.enter_context(tempfile.TemporaryFile("w+")) for _ in range(1, workers)]
        processes: List[subprocess.Popen] = []
        before = {number: signal.signal(number, _end) for number in (signal.SIGTERM, signal.SIGHUP)}
        try:
            for rank, log in enumerate([None, *logs]):
                arguments = [program(command[0]), *command[1:], *shared, *_rank(rank, "hydra" in name)]
                processes.append(
                    subprocess.Popen(
                        arguments,
                        env=environment,
                        stdout=log,
                        stderr=log,
                        preexec_fn=None if _LIBC is None else _end_with_parent,
                    )
                )
            first = _first_failure(processes)
            if first is None:
                return 0
            _wait(processes, patience)
            return _report(first, processes, logs)
        finally:
            _stop(processes)
            for number, handler in before.items():
                signal.signal(number, handler)


def _end(number: int, _: object) -> None:
    raise SystemExit(128 + number)  # and so stop the workers


def _end_with_parent() -> None:
    """In a worker, before its command: a launcher that is killed cannot stop it any more, the kernel can."""
    _LIBC.prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)


def _rank(rank: int, hydra: bool) -> List[str]:
    return [f"distributed_training.distributed_rank={rank}"] if hydra else ["--distributed-rank", str(rank)]


def worker_options(workers: int, port: int, hydra: bool = False) -> List[str]:
    """fairseq's options for each of *workers* on this machine's CPUs, but its rank; *hydra* for fairseq-hydra-train."""
    if hydra:
        settings = {
            "distributed_world_size": workers,
            "distributed_no_spawn": "true",
            "distributed_backend": "gloo",
            "ddp_backend": "legacy_ddp",
            "distributed_init_method": f"'tcp://127.0.0.1:{port}'",
        }
        return ["common.cpu=true", *(f"distributed_training.{name}={value}" for name, value in settings.items())]
    return [
        *("--cpu", "--distributed-world-size", str(workers), "--distributed-no-spawn"),
        *("--distributed-backend", "gloo", "--ddp-backend", "legacy_ddp"),
        *("--distributed-init-method", f"tcp://127.0.0.1:{port}"),
    ]


def program(name: str) -> str:
    """The path of a console command of this environment, or what *name* is the path of."""
    path = Path(name) if os.sep in name else Path(sys.executable).parent / name
    if not path.is_file():
        raise UserError(f"{name}: no such {'file' if os.sep in name else f'command beside {sys.executable}'}")
    return str(path)


def free_port() -> int:
    """A port of this machine that nobody listens on.

    Drawn below those that Linux gives away by itself: seconds pass until the first worker listens on it, in which
    another launch or a connection would get the next of those.
    """
    with socket.socket() as probe:
        while True:
            port = random.SystemRandom().randrange(20_000, 32_768)  # whatever seed another launch has too
            with contextlib.suppress(OSError):  # taken
                probe.bind(("127.0.0.1", port))
                return port


def _first_failure(processes: Sequence[subprocess.Popen]) -> Optional[int]:
    """Wait until all have ended well, None, or one has not: its rank."""
    while True:
        statuses = [process.poll() for process in processes]
        for rank, status in enumerate(statuses):
            if status:
                return rank
        if all(status == 0 for status in statuses):
            return None
        time.sleep(0.05)


def _wait(processes: Sequence[subprocess.Popen], patience: float) -> None:
    until = time.monotonic() + patience
    while time.monotonic() < until and any(process.poll() is None for process in processes):
        time.sleep(0.05)


def _report(first: int, processes: Sequence[subprocess.Popen], logs: Sequence[IO[str]]) -> int:
    status = processes[first].returncode
    if first > 0:
        log = logs[first - 1]
        log.seek(0)
        sys.stderr.write(log.read()[-5000:])
    how = f"exit status {status}" if status > 0 else f"signal {-status} ({signal.Signals(-status).name})"
    print(f"worker {first} of {len(processes)} ended first, with {how}", file=sys.stderr)
    return status if status > 0 else 128 - status


def _stop(processes: Sequence[subprocess.Popen]) -> None:
    for process in processes:
        if process.poll() is None:
            process.terminate()
    _wait(processes, 5)
    for process in processes:
        if process.poll() is None:
            process.kill()
        process.wait()
