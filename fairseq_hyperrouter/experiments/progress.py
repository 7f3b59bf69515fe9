"""A bar of the updates of all runs."""

import contextlib
import sys
import threading
from typing import Any, Iterator, Sequence

from tqdm import tqdm

from .run_folder import RunFolder


@contextlib.contextmanager
def progress(folders: Sequence[RunFolder]) -> Iterator[tqdm]:
    """Show it inside the ``with`` block, by what the trainings log; tqdm tells the time left.

    What is written to its ``fp`` goes to stderr, and the work goes on when nobody reads that any more.
    """
    done = [folder.updates_saved() for folder in folders]
    ended = threading.Event()
    total = sum(one.run.updates for one in folders)
    with tqdm(total=total, initial=sum(done), unit="update", miniters=1, file=_Stderr()) as bar:

        def watch() -> None:
            while not ended.wait(1.0):
                for place, folder in enumerate(folders):
                    now = max(folder.updates_done(), done[place])
                    bar.update(now - done[place])
                    done[place] = now
                bar.set_postfix_str(f"{sum(folder.is_evaluated for folder in folders)}/{len(folders)} runs done")

        watcher = threading.Thread(target=watch, daemon=True)
        watcher.start()
        try:
            yield bar
        finally:
            ended.set()
            watcher.join()


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
