"""Tokens per second of fairseq-train on a GPU, beside stock transformer_lm with as many active FLOPs.

python -m benchmarks.gpu.trainer DATA [--quick]      (DATA: a folder made by fairseq-preprocess)
"""

import statistics
from typing import Any, Dict, List

from ..harness import parser, progress, report
from ..models import BILLION, LARGE, SMALL, TINY, experts, stock
from ..sizes import EXPERTS
from ..training import updates
from .clock import ON_GPU

FLOAT32, BF16, AMP, FP16 = (), ("--bf16",), ("--amp",), ("--fp16", "--memory-efficient-fp16")
CASES = [
    *((SMALL, k, BF16) for k in (1, 2, 8)),
    *((SMALL, 2, precision) for precision in (AMP, FP16)),
    (LARGE, 2, BF16),
    *((BILLION, 2, precision) for precision in (BF16, AMP, FP16)),
]
QUICK = [(TINY, k, FLOAT32) for k in (1, 2)]


def main() -> None:
    """Measure, print and write the table."""
    options = parser(__doc__, data=True)
    options.add_argument("--updates", type=int, default=80, help="timed, of every training (default: %(default)s)")
    args = options.parse_args()
    number = 4 if args.quick else args.updates
    where = ["--no-save", "--num-workers", "1"] if ON_GPU else ["--no-save", "--cpu"]
    rows: List[List[Any]] = [["model", "precision", "k", "stock, tokens/s", "hyperrouter, tokens/s", "ratio"]]
    details = {}
    for model, k, precision in progress(QUICK if args.quick else CASES, "trainings"):
        what = " ".join(precision) or "float32"
        case = f"{model.name}, {what}, k = {k}"
        speeds: Dict[str, float] = {}
        for name, own in (("stock", stock(model, k)), ("hyperrouter", experts(model, k))):
            try:
                timed = updates([args.data, *own, *precision, *where], number)
            except RuntimeError as error:  # out of memory
                print(f"{case}, {name}: failed\n{error}")
                continue
            steady = [update.wall for update in timed[number // 2 :]]
            speeds[name] = model.samples * model.tokens / statistics.median(steady)
        ratio = speeds["hyperrouter"] / speeds["stock"] if len(speeds) == 2 else ""
        cells = (f"{speeds[name]:,.0f}" if name in speeds else "failed" for name in ("stock", "hyperrouter"))
        rows.append([model.name, what, k, *cells, ratio])
        details[case] = speeds
    report("gpu.trainer", {f"fairseq-train, Adam, E {EXPERTS}": rows}, details)


if __name__ == "__main__":
    main()
