"""A bar of all runs."""

import contextlib
import sys
import threading
from typing import Any, Iterator, Sequence

from tqdm import tqdm

from .run_folder import RunFolder

TRAINING = 0.85
"""Of a run's time, about; the rest is its evaluation."""


@contextlib.contextmanager
def progress(folders: Sequence[RunFolder]) -> Iterator[tqdm]:
    """Show it inside the ``with`` block, by what the trainings log; tqdm tells the time left.

    What is written to its ``fp`` goes to stderr, and the work goes on when nobody reads that any more.
    """
    ended = threading.Event()

    def done(updates: Sequence[int]) -> float:
        """Runs."""
        parts = [
            1.0 if folder.is_evaluated else TRAINING * min(1.0, now / folder.run.updates)
            for folder, now in zip(folders, updates)
        ]
        return round(sum(parts), 2)

    saved = [folder.updates_saved() for folder in folders]
    updates = sum(folder.run.updates for folder in folders)
    with tqdm(total=len(folders), initial=done(saved), unit="run", miniters=0, file=_Stderr()) as bar:

        def show() -> None:
            now = [max(folder.updates_done(), before) for folder, before in zip(folders, saved)]
            bar.set_postfix_str(f"{sum(now):,} of {updates:,} updates", refresh=False)
            bar.n = done(now)
            bar.refresh()

        def watch() -> None:
            while not ended.wait(1.0):
                show()

        watcher = threading.Thread(target=watch, daemon=True)
        watcher.start()
        try:
            yield bar
        finally:
            ended.set()
            watcher.join()
            show()


class _Stderr:
    """sys.stderr, whose lost reader is no error: tqdm would keep its lock for ever when a write fails."""

    def write(self, text: str) -> None:
        with contextlib.suppress(OSError, ValueError):
            sys.stderr.write(text)

    def flush(self) -> None:
        with contextlib.suppress(OSError, ValueError):
            sys.stderr.flush()

    def __getattr__(self, name: str) -> Any:
        return getattr(sys.stderr, name)
