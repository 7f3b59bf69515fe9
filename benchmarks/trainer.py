"""fairseq-train with experts beside stock transformer_lm with as many active FLOPs.

CPU time per update is that of a longer training less that of a shorter one, over the updates between: starting and
stopping cancel out. Runs take turns.

python -m benchmarks.trainer DATA [--quick]      (DATA: a folder made by fairseq-preprocess)
"""

from typing import Dict, List

from .commands import COMMON, EXPERTS, HIDDEN, LAYERS, WIDTH, cpu_seconds, experts
from .harness import medians, parser, progress, report

TOP_KS = (1, 2, 8)


def main() -> None:
    """Measure, print and write the tables."""
    options = parser(__doc__)
    options.add_argument("data", help="folder made by fairseq-preprocess")
    args = options.parse_args()
    repeats, updates, samples, length = (1, (1, 2), 2, 64) if args.quick else (3, (1, 4), 16, 512)
    common = [args.data, *COMMON, "--batch-size", str(samples), "--tokens-per-sample", str(length)]
    runs: Dict[str, List[str]] = {}
    for k in TOP_KS:
        runs[f"stock k={k}"] = [
            *("--task", "language_modeling", "--arch", "transformer_lm", "--criterion", "cross_entropy"),
            *("--decoder-ffn-embed-dim", str(k * HIDDEN)),
        ]
        for router in ("smoe", "hyperrouter"):
            runs[f"{router} k={k}"] = experts(router, k)
    seconds: Dict[str, List[float]] = {name: [] for name in runs}
    for repeat in range(repeats):
        for name in progress(list(runs), f"round {repeat + 1} of {repeats}"):
            short, long = (cpu_seconds([*common, *runs[name], "--max-update", str(n)]) for n in updates)
            seconds[name].append((long - short) / (updates[1] - updates[0]))
    median = medians(seconds)
    tokens = samples * length
    rows = [["k", "stock, tokens/s", "smoe, tokens/s", "hyperrouter, tokens/s", "smoe / stock", "hyperrouter / stock"]]
    for k in TOP_KS:
        speeds = [tokens / median[f"{name} k={k}"] for name in ("stock", "smoe", "hyperrouter")]
        rows.append([k, *(f"{speed:,.0f}" for speed in speeds), speeds[1] / speeds[0], speeds[2] / speeds[0]])
    title = f"fairseq-train, {LAYERS} layers, d {WIDTH}, F {HIDDEN}, E {EXPERTS}, {tokens} tokens per update"
    report("trainer", {title: rows}, seconds)


if __name__ == "__main__":
    main()
