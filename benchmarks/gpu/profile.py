"""Where the time of a fairseq-train on a GPU goes: its operations, most expensive first.

python -m benchmarks.gpu.profile DATA [--quick]      (DATA: a folder made by fairseq-preprocess)
"""

import sys
import tempfile
from typing import List

from fairseq_cli.train import cli_main
from torch.profiler import ProfilerActivity, profile

from .. import harness
from ..harness import parser
from ..models import BILLION, SMALL, TINY, experts, stock
from ..training import OPTIONS
from .clock import ON_GPU
from .trainer import BF16

ROWS = 25


def main() -> None:
    """Profile two trainings in this process, print and write their tables."""
    args = parser(__doc__, data=True).parse_args()
    harness.RESULTS.mkdir(exist_ok=True)
    for model in (TINY,) if args.quick else (SMALL, BILLION):
        for name, own in (("stock", stock(model, 2)), ("hyperrouter", experts(model, 2))):
            table = _profiled([args.data, *own], updates=2 if args.quick else 12)
            path = harness.RESULTS / f"gpu.profile.{model.name.split()[-1]}.{name}.txt"
            path.write_text(table + "\n")
            print(f"{table}\nwrote {path}")


def _profiled(arguments: List[str], updates: int) -> str:
    where = BF16 if ON_GPU else ("--cpu",)
    activities = [ProfilerActivity.CPU, *[ProfilerActivity.CUDA] * ON_GPU]
    with tempfile.TemporaryDirectory() as new, profile(activities=activities) as profiler:
        options = [*OPTIONS, "--no-save", "--save-dir", new, "--max-update", str(updates)]
        sys.argv = ["fairseq-train", *options, *arguments, *where]
        cli_main()
    key = "self_device_time_total" if ON_GPU else "self_cpu_time_total"
    return profiler.key_averages().table(sort_by=key, row_limit=ROWS, max_name_column_width=60)


if __name__ == "__main__":
    main()
