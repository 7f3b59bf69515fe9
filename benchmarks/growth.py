"""One layer, forward and backward, against the number of experts at a fixed number of them per token.

python -m benchmarks.growth [--quick]
"""

from functools import partial

import torch

from .harness import interleaved, medians, parser, report
from .layer import draw, step
from .peers import Dense, Ours, RawGroupedMM

D, HIDDEN, TOP_K = 256, 512, 2
EXPERTS = (8, 16, 64, 256)


def main() -> None:
    """Measure, print and write the table."""
    quick = parser(__doc__).parse_args().quick
    tokens, repeats = (256, 1) if quick else (8192, 7)
    x, dy = torch.randn(tokens, D, requires_grad=True), torch.randn(tokens, D)
    dense = Dense(D, HIDDEN, 1, TOP_K)
    layers = {E: {"ours": Ours(D, HIDDEN, E, TOP_K), "raw": RawGroupedMM(D, HIDDEN, E, TOP_K)} for E in EXPERTS}
    steps = {("dense", 0): partial(step, dense, x, dy)}
    steps.update({(name, E): partial(step, layer, x, dy) for E in EXPERTS for name, layer in layers[E].items()})
    seconds = medians(interleaved(steps, repeats, renew=partial(draw, x)))
    limit = seconds["dense", 0]
    rows = [["E", "milliseconds", "x dense", "x E = 8", "rows per expert", "raw grouped_mm (no biases), x dense"]]
    for E in EXPERTS:
        ours = seconds["ours", E]
        share = ours / seconds["ours", EXPERTS[0]]
        rows.append([E, ours * 1e3, ours / limit, share, tokens * TOP_K // E, seconds["raw", E] / limit])
    title = f"Time against E at k = {TOP_K}, T {tokens}, d {D}, F {HIDDEN}; dense: {limit * 1e3:.0f} ms"
    report("growth", {title: rows}, {f"{name} {E}": value for (name, E), value in seconds.items()})


if __name__ == "__main__":
    main()
