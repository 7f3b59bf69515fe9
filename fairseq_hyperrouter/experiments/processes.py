"""The processes of an experiment, which end when it does."""

import os
import signal
import subprocess
import threading
from types import TracebackType
from typing import IO, Any, List, Optional, Sequence, Type


class Ended(Exception):
    """A process was ended, or not started, because the experiment is ending."""


class Processes:
    """Those that run now; each has *threads* threads.

    Inside the ``with`` block SIGTERM is a SystemExit of this process, as SIGINT is a KeyboardInterrupt.
    """

    def __init__(self, threads: int) -> None:
        self._environment = {"OMP_NUM_THREADS": str(threads), "PYTHONWARNINGS": "ignore", **os.environ}
        self._started: List[subprocess.Popen] = []
        self._lock = threading.Lock()
        self._ending = False

    def run(self, arguments: Sequence[str], log: IO[str], inherited: int) -> int:
        """Run a command to its end and return its exit status.

        Args:
            log: an open file, where its output goes.
            inherited: a file descriptor that it shall have too.

        Raises:
            Ended: ``end`` was called.
        """
        with self._lock:
            if self._ending:
                raise Ended
            process = subprocess.Popen(
                arguments,
                env=self._environment,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                pass_fds=(inherited,),
            )
            self._started.append(process)
        status = process.wait()
        if status != 0 and self._ending:
            raise Ended
        return status

    def end(self) -> None:
        """End all that run, and let no other start."""
        with self._lock:
            self._ending = True
            for process in self._started:
                if process.poll() is None:
                    process.terminate()

    def __enter__(self) -> "Processes":
        self._before = signal.signal(signal.SIGTERM, _exit)
        return self

    def __exit__(
        self, kind: Optional[Type[BaseException]], error: Optional[BaseException], trace: Optional[TracebackType]
    ) -> None:
        signal.signal(signal.SIGTERM, self._before)


def _exit(number: int, _: Any) -> None:
    raise SystemExit(128 + number)
