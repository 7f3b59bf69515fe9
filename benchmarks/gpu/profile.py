"""Where the time of a fairseq-train on a GPU goes: its operations, most expensive first.

python -m benchmarks.gpu.profile DATA [--quick]      (DATA: a folder made by fairseq-preprocess)
"""

import sys
from typing import List

import torch
from fairseq_cli.train import cli_main
from torch.profiler import ProfilerActivity, profile

from .. import harness
from ..harness import parser
from .trainer import BF16, BILLION, SMALL, TINY, experts, stock

ROWS = 25


def main() -> None:
    """Profile two trainings in this process, print and write their tables."""
    options = parser(__doc__)
    options.add_argument("data", help="folder made by fairseq-preprocess")
    args = options.parse_args()
    harness.RESULTS.mkdir(exist_ok=True)
    for model in (TINY,) if args.quick else (SMALL, BILLION):
        for name, own in (("stock", stock(model, 2)), ("hyperrouter", experts(model, 2))):
            table = _profiled([args.data, *own], updates=2 if args.quick else 12)
            path = harness.RESULTS / f"gpu.profile.{model.name.split()[-1]}.{name}.txt"
            path.write_text(table + "\n")
            print(f"{table}\nwrote {path}")


def _profiled(arguments: List[str], updates: int) -> str:
    on_gpu = torch.cuda.is_available()
    sys.argv = [
        *("fairseq-train", *arguments, "--optimizer", "adam", "--lr", "1e-4", "--clip-norm", "0.25", "--no-save"),
        *("--disable-validation", "--max-update", str(updates), "--log-format", "none", "--num-workers", "0"),
        *(BF16 if on_gpu else ("--cpu",)),
    ]
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if on_gpu else [])]
    with profile(activities=activities) as profiler:
        cli_main()
    key = "self_device_time_total" if on_gpu else "self_cpu_time_total"
    return profiler.key_averages().table(sort_by=key, row_limit=ROWS, max_name_column_width=60)


if __name__ == "__main__":
    main()
