"""The bar of an experiment."""

import io
import sys
import time
from types import SimpleNamespace

from fairseq_hyperrouter.experiments.progress import progress


def folder(done):
    return SimpleNamespace(
        run=SimpleNamespace(updates=10), updates_saved=lambda: 2, updates_done=lambda: done, is_evaluated=False
    )


class Reader(io.StringIO):
    is_gone = False

    def write(self, text):
        if self.is_gone:
            raise BrokenPipeError(32, "Broken pipe")
        return super().write(text)


def test_says_where_the_trainings_are(capsys):
    with progress([folder(5), folder(10)]) as bar:
        bar.write("one failed", file=bar.fp)
        until = time.monotonic() + 30
        while bar.n < 15:
            assert time.monotonic() < until
            time.sleep(0.1)
    err = capsys.readouterr().err
    assert "one failed\n" in err and "15/20" in err and "0/2 runs done" in err


def test_goes_on_when_nobody_reads_it(monkeypatch):
    """As after the end of a pager or of a terminal."""
    reader = Reader()
    monkeypatch.setattr(sys, "stderr", reader)
    with progress([folder(5)]) as bar:
        reader.is_gone = True
        until = time.monotonic() + 30
        while bar.n < 5:
            assert time.monotonic() < until
            time.sleep(0.1)
        bar.write("one failed", file=bar.fp)
