"""fairseq-train in a process of its own, and the time of its updates."""

import json
import os
import subprocess
import sys
import tempfile
import time
from itertools import pairwise
from typing import List, NamedTuple, Sequence

from fairseq_cli.train import cli_main
from torch.optim.optimizer import register_optimizer_step_post_hook

OPTIONS = [
    *("--optimizer", "adam", "--lr", "1e-4", "--clip-norm", "0.25", "--disable-validation", "--log-format", "none"),
    *("--num-workers", "0", "--required-batch-size-multiple", "1", "--distributed-world-size", "1"),
]
"""Of every training that is timed. Where an option is given again, fairseq takes the last."""


class Seconds(NamedTuple):
    """Of one update: on the wall, and of the process's CPU time."""

    wall: float
    cpu: float


def updates(arguments: Sequence[str], number: int) -> List[Seconds]:
    """Of *number* updates, each from the optimizer's step before it to its own; an update before them starts the time.

    Raises:
        RuntimeError: with what the training said, where it failed.
    """
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore"}
    with tempfile.TemporaryDirectory() as new:  # where there is a checkpoint already a training would go on from it
        options = [*OPTIONS, "--max-update", str(number + 1), "--save-dir", new, *arguments]
        command = [sys.executable, "-m", __name__, *options]
        done = subprocess.run(command, env=environment, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(done.stderr[-3000:])
    ends = json.loads(done.stdout.splitlines()[-1])
    return [Seconds(*(b - a for a, b in zip(before, after))) for before, after in pairwise(ends)]


def _main() -> None:
    ends = []
    register_optimizer_step_post_hook(lambda *_: ends.append((time.perf_counter(), time.process_time())))
    cli_main()
    print(json.dumps(ends))


if __name__ == "__main__":
    _main()
