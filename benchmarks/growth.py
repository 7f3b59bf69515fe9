"""One layer, forward and backward, against the number of experts at a fixed number of them per token.

python -m benchmarks.growth [--quick]
"""

from functools import partial

import torch

from .harness import interleaved, medians, parser, report
from .layer import draw, step
from .peers import Dense, Ours, RawGroupedMM
from .sizes import HIDDEN, WIDTH

TOP_K = 2
COUNTS = (8, 16, 64, 256)


def main() -> None:
    """Measure, print and write the table."""
    quick = parser(__doc__).parse_args().quick
    tokens, repeats = (256, 1) if quick else (8192, 7)
    x, dy = torch.randn(tokens, WIDTH, requires_grad=True), torch.randn(tokens, WIDTH)
    dense = Dense(WIDTH, HIDDEN, 1, TOP_K)
    layers = {E: {"ours": Ours(WIDTH, HIDDEN, E, TOP_K), "raw": RawGroupedMM(WIDTH, HIDDEN, E, TOP_K)} for E in COUNTS}
    steps = {("dense", 0): partial(step, dense, x, dy)}
    steps.update({(name, E): partial(step, layer, x, dy) for E in COUNTS for name, layer in layers[E].items()})
    seconds = medians(interleaved(steps, repeats, renew=partial(draw, x)))
    limit = seconds["dense", 0]
    rows = [
        ["E", "milliseconds", "x dense", f"x E = {COUNTS[0]}", "rows per expert", "raw grouped_mm (no biases), x dense"]
    ]
    for E in COUNTS:
        ours = seconds["ours", E]
        share = ours / seconds["ours", COUNTS[0]]
        rows.append([E, ours * 1e3, ours / limit, share, tokens * TOP_K // E, seconds["raw", E] / limit])
    title = f"Time against E at k = {TOP_K}, T {tokens}, d {WIDTH}, F {HIDDEN}; dense: {limit * 1e3:.0f} ms"
    report("growth", {title: rows}, {f"{name} {E}": value for (name, E), value in seconds.items()})


if __name__ == "__main__":
    main()
