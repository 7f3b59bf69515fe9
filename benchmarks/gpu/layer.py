"""One layer on a GPU, forward and backward, router included, beside other ways to write it.

python -m benchmarks.gpu.layer [--quick]
"""

import gc
from functools import partial
from typing import Any, Dict, List, NamedTuple, Tuple

import torch
from torch import Tensor, nn

from ..harness import interleaved, medians, parser, progress, report
from ..layer import forget, step
from ..models import SMALL
from ..peers import DENSE, OURS, PEERS, Builder, Dense, Ours
from ..sizes import EXPERTS, HIDDEN, TOP_KS, WIDTH
from .clock import CLOCK, DEVICE, graphed, limits, peak_bytes


class Shape(NamedTuple):
    """Of a layer and its batch."""

    name: str
    tokens: int
    D: int
    hidden: int
    E: int
    top_k: Tuple[int, ...]


SHAPES = (
    Shape("the paper's", SMALL.samples * SMALL.tokens, WIDTH, HIDDEN, EXPERTS, TOP_KS),
    Shape("a large one", 16_384, 2048, 8192, 64, (2,)),
)
QUICK = (Shape("a small one", 64, 16, 48, 4, (1, 2)),)
OTHERS = ("raw grouped_mm", "Hugging Face, grouped_mm", "padded bmm", "loop over a ModuleList")
LAYERS: Dict[str, Builder] = {
    OURS: Ours,
    **{f"{OURS}, {backend}": partial(Ours, backend=backend) for backend in ("blocks", "triton")},
    **{name: PEERS[name] for name in OTHERS},
}
GRAPHED = ", CUDA graph"
AS_GRAPHS = (DENSE, OURS, OTHERS[0])
Figures = Dict[str, Dict[str, float]]
"""{layer: its seconds, those over the dense layer's timed in turns with it, TFLOP/s and MiB}"""


def main() -> None:
    """Measure, print and write the tables."""
    quick = parser(__doc__).parse_args().quick
    repeats = 2 if quick else 30
    machine = limits(64 if quick else 8192)
    tables: Dict[str, Any] = {"Limits of this machine": [list(machine), [f"{rate:.3g}" for rate in machine.values()]]}
    details: Dict[str, Any] = {"limits": machine}
    for shape in QUICK if quick else SHAPES:
        for dtype in (torch.bfloat16, torch.float32):
            found = {k: _measure(shape, k, dtype, repeats) for k in progress(shape.top_k, f"{shape.name}, {dtype}")}
            title = f"{shape.name}: T {shape.tokens}, d {shape.D}, F {shape.hidden}, E {shape.E}, {str(dtype)[6:]}"
            tables.update(_tables(title, found))
            details[title] = found
    report("gpu.layer", tables, details)


def _measure(shape: Shape, top_k: int, dtype: torch.dtype, repeats: int) -> Figures:
    x = torch.randn(shape.tokens, shape.D, device=DEVICE, dtype=dtype, requires_grad=True)
    found: Figures = {}
    for name in (DENSE, *LAYERS):
        try:
            found.update(_beside_dense(name, shape, top_k, x, repeats))
        except (ImportError, RuntimeError, ValueError) as error:  # not installed, out of memory, no such product here
            print(f"{name}, k = {top_k}, {dtype}: left out, {str(error).splitlines()[0]}")
        gc.collect()
        torch.cuda.empty_cache()
    return found


def _beside_dense(name: str, shape: Shape, top_k: int, x: Tensor, repeats: int) -> Figures:
    dy = torch.randn_like(x)
    layers = {of: _build({DENSE: Dense, **LAYERS}[of], shape, top_k, x.dtype) for of in (DENSE, name)}
    steps = {of: partial(step, layer, x, dy) for of, layer in layers.items()}
    graphs = {of + GRAPHED: graphed(run) for of, run in steps.items()} if name in AS_GRAPHS else {}
    peak = peak_bytes(steps[name], partial(forget, layers[name], x))
    timed = steps if None in graphs.values() else {**steps, **graphs}
    seconds = medians(interleaved(timed, repeats, clock=CLOCK))
    found = {}
    for kind in ("", GRAPHED):
        if name + kind in seconds:
            own, dense = seconds[name + kind], seconds[DENSE + kind]
            tflops = 12 * shape.tokens * top_k * shape.D * shape.hidden / own / 1e12
            found[name + kind] = {"seconds": own, "ratio": own / dense, "tflops": tflops}
    found[name]["mebibytes"] = peak / 2**20
    return found


def _build(builder: Builder, shape: Shape, top_k: int, dtype: torch.dtype) -> nn.Module:
    with DEVICE:
        return builder(shape.D, shape.hidden, shape.E, top_k).to(dtype)


def _tables(title: str, found: Dict[int, Figures]) -> Dict[str, List[List[Any]]]:
    names = dict.fromkeys(name for row in found.values() for name in row)
    head = ["", *(f"k={k}" for k in found)]
    tables = {}
    for key, description, scale, form in (
        ("ratio", "Time over that of the dense feed-forward", 1, ".2f"),
        ("seconds", "Milliseconds", 1e3, ".3f"),
        ("tflops", "TFLOP/s", 1, ".3g"),
        ("mebibytes", "Peak memory in MiB, gradients included", 1, ".2f"),
    ):
        rows = [
            [name, *(f"{of[name][key] * scale:{form}}" if key in of.get(name, {}) else "" for of in found.values())]
            for name in names
        ]
        tables[f"{description}, {title}"] = [head, *rows]
    return tables


if __name__ == "__main__":
    main()
