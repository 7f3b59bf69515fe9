"""fairseq-train with experts beside stock transformer_lm with as many active FLOPs.

Trainings take turns, each in a process of its own, and what counts is the CPU time of their updates.

python -m benchmarks.trainer DATA [--quick]      (DATA: a folder made by fairseq-preprocess)
"""

from typing import Any, Dict, List

from .harness import medians, parser, progress, report
from .models import SMALL, experts, stock
from .training import updates

TOP_KS = (1, 2, 8)


def main() -> None:
    """Measure, print and write the table."""
    args = parser(__doc__, data=True).parse_args()
    model = SMALL._replace(samples=2, tokens=64) if args.quick else SMALL._replace(samples=16)
    rounds = 1 if args.quick else 3
    runs: Dict[Any, List[str]] = {}
    for k in TOP_KS:
        runs["stock", k] = stock(model, k)
        runs["smoe", k] = experts(model, k, "smoe")
        runs["hyperrouter", k] = experts(model, k)
    seconds: Dict[Any, List[float]] = {run: [] for run in runs}
    for number in range(rounds):
        for run in progress(list(runs), f"round {number + 1} of {rounds}"):
            timed = updates([args.data, *runs[run], "--cpu", "--no-save"], 3)
            seconds[run] += [update.cpu for update in timed]
    median = medians(seconds)
    tokens = model.samples * model.tokens
    rows = [["k", "stock, tokens/s", "smoe, tokens/s", "hyperrouter, tokens/s", "smoe / stock", "hyperrouter / stock"]]
    for k in TOP_KS:
        dense, smoe, hyperrouter = (tokens / median[name, k] for name in ("stock", "smoe", "hyperrouter"))
        speeds = (f"{speed:,.0f}" for speed in (dense, smoe, hyperrouter))
        rows.append([k, *speeds, smoe / dense, hyperrouter / dense])
    title = f"fairseq-train, {model.size}, {tokens} tokens per update"
    report("trainer", {title: rows}, {f"{name} k={k}": values for (name, k), values in seconds.items()})


if __name__ == "__main__":
    main()
