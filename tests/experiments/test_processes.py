"""Processes end with their experiment."""

import os
import signal
import sys
import threading
import time

import pytest

from fairseq_hyperrouter.experiments.processes import Ended, Processes


@pytest.fixture
def python(tmp_path):
    """python(processes, code): its exit status and what it printed."""

    def run(processes, code):
        with open(tmp_path / "log", "w+") as log:
            status = processes.run([sys.executable, "-c", code], log, log.fileno())
            log.seek(0)
            return status, log.read()

    return run


def test_exit_status_and_output(python, monkeypatch):
    code = "import os, sys; print(os.environ['OMP_NUM_THREADS'], flush=True); sys.exit('failed')"
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    assert python(Processes(threads=3), code) == (1, "3\nfailed\n")


def test_end(python):
    """What runs is ended, and nothing starts any more."""
    processes = Processes(threads=1)
    timer = threading.Timer(0.5, processes.end)
    timer.start()
    start = time.monotonic()
    with pytest.raises(Ended):
        python(processes, "import time; time.sleep(60)")
    assert time.monotonic() - start < 30
    with pytest.raises(Ended):
        python(processes, "")


def test_sigterm_is_an_exit_inside_the_block():
    before = signal.getsignal(signal.SIGTERM)
    with pytest.raises(SystemExit) as error, Processes(threads=1):
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(5)
    assert error.value.code == 128 + signal.SIGTERM and signal.getsignal(signal.SIGTERM) == before
