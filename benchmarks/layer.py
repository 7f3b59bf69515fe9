"""One layer, forward and backward, router included, beside other libraries: time and peak memory.

python -m benchmarks.layer [--quick]
"""

from functools import partial
from typing import Any, Dict, List

import torch
from torch import Tensor, nn

from .harness import interleaved, medians, parser, peak_bytes, progress, report
from .peers import DENSE, build_all
from .sizes import EXPERTS, HIDDEN, TOP_KS, WIDTH

SHAPES = [(WIDTH, HIDDEN), (512, 2048)]
SHIFT = 0.3
"""Standard deviation of a batch's mean. Texts differ, so experts have other numbers of rows at every step."""

Figures = Dict[str, Dict[str, float]]
"""{layer: its seconds and MiB}"""


def main() -> None:
    """Measure, print and write the tables."""
    options = parser(__doc__)
    options.add_argument("--width", type=int, choices=[D for D, _ in SHAPES], help="only this one")
    args = options.parse_args()
    shapes = [shape for shape in SHAPES if args.width in (None, shape[0])]
    tokens, repeats = (128, 1) if args.quick else (2048, 9)
    tables, details = {}, {}
    for D, hidden in shapes[:1] if args.quick else shapes:
        rounds = min(repeats, 5) if D > WIDTH else repeats
        found = {K: _measure(tokens, D, hidden, K, rounds) for K in progress(TOP_KS, f"d {D}, F {hidden}")}
        shape = f"T {tokens}, d {D}, F {hidden}, E {EXPERTS}"
        tables.update(_tables(shape, list(found.values())))
        details[shape] = found
    report("layer", tables, details)


def _measure(tokens: int, D: int, hidden: int, K: int, repeats: int) -> Figures:
    x, dy = torch.randn(tokens, D, requires_grad=True), torch.randn(tokens, D)
    layers = build_all(D, hidden, EXPERTS, K)
    steps = {name: partial(step, layer, x, dy) for name, layer in layers.items()}
    seconds = medians(interleaved(steps, repeats, renew=partial(draw, x)))
    peaks = {name: peak_bytes(steps[name], partial(forget, layer, x)) for name, layer in layers.items()}
    return {name: {"seconds": seconds[name], "mebibytes": peaks[name] / 2**20} for name in layers}


def _tables(shape: str, found: List[Figures]) -> Dict[str, List[List[Any]]]:
    names = dict.fromkeys(name for figures in found for name in figures)
    time, memory = ([["", *(f"k={K}" for K in TOP_KS)]] for _ in range(2))
    time.append([f"{DENSE} (ms)", *(round(figures[DENSE]["seconds"] * 1e3) for figures in found)])
    for name in names:
        own = [(figures.get(name), figures[DENSE]) for figures in found]
        if name != DENSE:
            time.append([name, *(of["seconds"] / dense["seconds"] if of else "" for of, dense in own)])
        memory.append([name, *(round(of["mebibytes"]) if of else "" for of, _ in own)])
    return {
        f"Time over that of the dense feed-forward, {shape}": time,
        f"Peak memory of a step in MiB, gradients included, {shape}": memory,
    }


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
