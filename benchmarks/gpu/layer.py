"""One layer on a GPU, forward and backward, router included, beside other ways to write it.

python -m benchmarks.gpu.layer [--quick]
"""

import gc
from functools import partial
from typing import Any, Callable, Dict, List, NamedTuple, Tuple

import torch
from torch import nn

from ..harness import parser, progress, report
from ..layer import step
from ..peers import DENSE, OURS, PEERS, Builder, Dense, Ours
from .clock import device, graphed, interleaved, limits, peak_bytes


class Shape(NamedTuple):
    """Of a layer and its batch."""

    name: str
    tokens: int
    D: int
    hidden: int
    E: int
    top_k: Tuple[int, ...]


SHAPES = (
    Shape("the paper's", 11_264, 256, 512, 16, (1, 2, 4, 8, 16)),
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


def _measure(shape: Shape, top_k: int, dtype: torch.dtype, repeats: int) -> Dict[str, Dict[str, float]]:
    """{layer: its seconds, those over the dense layer's timed in turns with it, TFLOP/s and MiB}."""
    x = torch.randn(shape.tokens, shape.D, device=device(), dtype=dtype, requires_grad=True)
    dy = torch.randn_like(x)
    flops = 12 * shape.tokens * top_k * shape.D * shape.hidden
    found: Dict[str, Dict[str, float]] = {}
    for name, builder in {DENSE: Dense, **LAYERS}.items():
        try:
            steps = {DENSE: step(_build(Dense, shape, top_k, dtype), x, dy)}
            steps[name] = step(_build(builder, shape, top_k, dtype), x, dy)
            for own in (DENSE, name):
                as_graph = graphed(steps[own]) if name in (DENSE, OURS, OTHERS[0]) else None
                if as_graph is not None:
                    steps[own + GRAPHED] = as_graph
            peak = peak_bytes(steps[name])
            seconds = interleaved(steps, repeats)
        except (ImportError, RuntimeError, ValueError) as error:  # not installed, out of memory, no such product here
            print(f"{name}, k = {top_k}, {dtype}: left out, {str(error).splitlines()[0]}")
            continue
        finally:
            steps = {}
            gc.collect()
            if device().type == "cuda":
                torch.cuda.empty_cache()
        for own in (name, name + GRAPHED):
            if own in seconds:
                dense = seconds.get(own.replace(name, DENSE), seconds[DENSE])
                found[own] = {"seconds": seconds[own], "ratio": seconds[own] / dense}
                found[own]["tflops"] = flops / seconds[own] / 1e12
        if peak is not None:
            found[name]["mebibytes"] = peak / 2**20
    return found


def _build(builder: Callable[..., nn.Module], shape: Shape, top_k: int, dtype: torch.dtype) -> nn.Module:
    with torch.device(device()):
        return builder(shape.D, shape.hidden, shape.E, top_k).to(dtype)


def _tables(title: str, found: Dict[int, Dict[str, Dict[str, float]]]) -> Dict[str, List[List[Any]]]:
    names = dict.fromkeys(name for row in found.values() for name in row)
    head = ["", *(f"k={k}" for k in found)]
    what = {
        "ratio": "Time over that of the dense feed-forward",
        "seconds": "Milliseconds",
        "tflops": "TFLOP/s",
        "mebibytes": "Peak memory in MiB, gradients included",
    }
    tables = {}
    for key, description in what.items():
        scale, digits = (1e3, 3) if key == "seconds" else (1, 2)
        rows = [
            [name, *(f"{of[name][key] * scale:.{digits}f}" if key in of.get(name, {}) else "" for of in found.values())]
            for name in names
        ]
        if any(any(row[1:]) for row in rows):
            tables[f"{description}, {title}"] = [head, *rows]
    return tables


if __name__ == "__main__":
    main()
