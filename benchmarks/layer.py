"""One layer, forward and backward, router included, beside other libraries: time and peak memory.

python -m benchmarks.layer [--quick]
"""

import logging
from functools import partial

import torch
from torch import Tensor, nn

from .harness import interleaved, medians, parser, peak_bytes, progress, report
from .peers import DENSE, build_all

SHAPES = [(256, 512), (512, 2048)]
TOP_KS = (1, 2, 4, 8, 16)
SHIFT = 0.3
"""Standard deviation of a batch's mean. Texts differ, so experts have other numbers of rows at every step."""


def main() -> None:
    """Measure, print and write the tables."""
    options = parser(__doc__)
    options.add_argument("--width", type=int, choices=[D for D, _ in SHAPES], help="only this one")
    args = options.parse_args()
    quick = args.quick
    shapes = SHAPES[:1] if quick else [shape for shape in SHAPES if args.width in (None, shape[0])]
    logging.basicConfig(level=logging.WARNING, format="%(message)s")
    tokens, repeats = (128, 1) if quick else (2048, 9)
    tables, details = {}, {}
    for D, hidden in shapes:
        rows, memory, milliseconds = {}, {}, {}
        for K in progress(TOP_KS, f"d {D}, F {hidden}"):
            x, dy = torch.randn(tokens, D, requires_grad=True), torch.randn(tokens, D)
            layers = build_all(D, hidden, 16, K)
            steps = {name: partial(step, layer, x, dy) for name, layer in layers.items()}
            seconds = medians(interleaved(steps, repeats if D == 256 else min(repeats, 5), renew=partial(draw, x)))
            milliseconds[K] = seconds[DENSE] * 1e3
            for name, run in steps.items():
                rows.setdefault(name, {})[K] = seconds[name] / seconds[DENSE]
                memory.setdefault(name, {})[K] = peak_bytes(run, partial(forget, layers[name], x)) / 2**20
        shape = f"T {tokens}, d {D}, F {hidden}, E 16"
        head = ["", *(f"k={K}" for K in TOP_KS)]
        ratios = [[name, *(rows[name].get(K, "") for K in TOP_KS)] for name in rows if name != DENSE]
        dense = [DENSE + " (ms)", *(round(milliseconds[K]) for K in TOP_KS)]
        tables[f"Time over that of the dense feed-forward, {shape}"] = [head, dense, *ratios]
        mebibytes = [[name, *(round(memory[name][K]) if K in memory[name] else "" for K in TOP_KS)] for name in rows]
        tables[f"Peak memory of a step in MiB, gradients included, {shape}"] = [head, *mebibytes]
        details[shape] = {"time": rows, "memory": memory, "dense_ms": milliseconds}
    report("layer", tables, details)


@torch.no_grad()
def draw(x: Tensor) -> None:
    """Another batch into x (T, D)."""
    x.normal_().add_(torch.randn(x.size(1)), alpha=SHIFT)


def step(layer: nn.Module, x: Tensor, dy: Tensor) -> None:
    """Forward and backward, once."""
    forget(layer, x)
    layer(x).backward(dy)


def forget(layer: nn.Module, x: Tensor) -> None:
    """The gradients of the last step."""
    for tensor in (x, *layer.parameters()):
        tensor.grad = None


if __name__ == "__main__":
    main()
