"""The bar of an experiment."""

import io
import sys
import time
from types import SimpleNamespace

from fairseq_hyperrouter.experiments.progress import progress


def folder(done, is_evaluated=False):
    run = SimpleNamespace(updates=10)
    return SimpleNamespace(run=run, updates_saved=lambda: 2, updates_done=lambda: done, is_evaluated=is_evaluated)


def wait_for(bar, runs):
    until = time.monotonic() + 30
    while abs(bar.n - runs) > 0.01:
        assert time.monotonic() < until
        time.sleep(0.1)


class Reader(io.StringIO):
    is_gone = False

    def write(self, text):
        if self.is_gone:
            raise BrokenPipeError(32, "Broken pipe")
        return super().write(text)


def test_says_where_the_trainings_are(capsys):
    folders = [folder(5), folder(10), folder(10, is_evaluated=True)]
    with progress(folders) as bar:
        bar.write("one failed", file=bar.fp)
        wait_for(bar, 0.85 / 2 + 0.85 + 1)
        folders[1].is_evaluated = True
    err = capsys.readouterr().err
    assert "one failed\n" in err and "2.27/3 [" in err and "25 of 30 updates" in err
    assert bar.n == 2.42  # also what was done since it was shown last


def test_goes_on_when_nobody_reads_it(monkeypatch):
    """As after the end of a pager or of a terminal."""
    reader = Reader()
    monkeypatch.setattr(sys, "stderr", reader)
    with progress([folder(5)]) as bar:
        reader.is_gone = True
        wait_for(bar, 0.85 / 2)
        bar.write("one failed", file=bar.fp)
