"""A function of a test on several gloo workers: ``python -m tests.workers MODULE FUNCTION WORKERS FOLDER``.

Worker r calls it with what FOLDER/task.pt holds; what it returns goes to FOLDER/r.pt.
"""

import importlib
import os
import sys
from pathlib import Path

import torch
import torch.distributed as dist


def on_workers(preloaded, function, workers, folder, task):
    """What *function*(task) returns on each of *workers* workers."""
    folder.mkdir(parents=True)
    torch.save(task, folder / "task.pt")
    done = preloaded.run("-m tests.workers", function.__module__, function.__name__, workers, folder)
    assert done.code == 0, done.log
    return [torch.load(folder / f"{rank}.pt") for rank in range(workers)]


def main(module, name, workers, folder):
    torch.set_num_threads(1)
    folder, workers = Path(folder), int(workers)
    function = getattr(importlib.import_module(module), name)
    children = []
    for rank in range(workers):
        child = os.fork()
        if not child:
            dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=workers)
            torch.save(function(torch.load(folder / "task.pt")), folder / f"{rank}.pt")
            dist.barrier()
            os._exit(0)
        children.append(child)
    return max(os.waitpid(child, 0)[1] for child in children) != 0


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
