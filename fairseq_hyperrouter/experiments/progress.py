"""A bar of the updates of all runs."""

import contextlib
import threading
from typing import Iterator, Sequence

from tqdm import tqdm

from .run_folder import RunFolder


@contextlib.contextmanager
def progress(folders: Sequence[RunFolder]) -> Iterator[tqdm]:
    """Show it inside the ``with`` block, by what the trainings log; tqdm tells the time left."""
    done = [folder.updates_saved() for folder in folders]
    ended = threading.Event()
    with tqdm(total=sum(one.run.updates for one in folders), initial=sum(done), unit="update", miniters=1) as bar:

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
