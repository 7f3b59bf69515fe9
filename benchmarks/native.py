"""The C code for CPUs beside torch: a layer's experts, attention, a linear map; what auto's bounds rest on.

python -m benchmarks.native [--quick]
"""

from functools import partial
from typing import Any, Callable, Dict, List, Sequence

import torch
import torch.nn.functional as F

from fairseq_hyperrouter.errors import UserError
from fairseq_hyperrouter.experts.native_products import NativeRunProducts
from fairseq_hyperrouter.experts.run_products import Rows
from fairseq_hyperrouter.models import causal_attention as attention
from fairseq_hyperrouter.native.usable import has_native

from .harness import interleaved, medians, parser, progress, report
from .layer import draw, step
from .peers import Ours
from .sizes import EXPERTS

LAYERS = [(64, 128, 1024), (256, 512, 512), (352, 1408, 1024), (512, 2048, 2048)]
TOP_KS = (1, 2, 4, 16)
FEW_ROWS = (4, 8, 16, 32)
CONTEXTS = (64, 128, 256, 512, 1024)
HEADS, SAMPLES, WIDTH = (8, 16, 32, 64), 8, 256
MAPS, ROWS = [(64, 64), (256, 256), (512, 512), (512, 2048)], (16, 64, 512, 4096)


def main() -> None:
    """Measure, print and write the tables."""
    quick = parser(__doc__).parse_args().quick
    if not has_native():
        raise UserError("benchmarks.native: needs a processor with AVX-512, and a C compiler when it was installed")
    few = slice(None, 1 if quick else None)
    repeats = 1 if quick else 9
    both, forward = ([["d, F, tokens", *(f"k={K}" for K in TOP_KS)]] for _ in range(2))
    for D, hidden, tokens in progress(LAYERS[few], "layers"):
        found = [_layer(D, hidden, EXPERTS, K, tokens, "runs", "native", repeats) for K in TOP_KS[few]]
        both.append([f"{D}, {hidden}, {tokens:,}", *(one[0] for one in found)])
        forward.append([f"{D}, {hidden}, {tokens:,}", *(one[1] for one in found)])
    grouped: List[List[Any]] = [["E", *(f"{rows} rows each" for rows in FEW_ROWS)]]
    for E in progress((16, 64, 256)[few], "small experts"):
        grouped.append([E, *(_layer(64, 128, E, 1, n * E, "native", "grouped", repeats)[0] for n in FEW_ROWS[few])])
    heads: List[List[Any]] = [["numbers per head", *(f"T={T:,}" for T in CONTEXTS)]]
    for d in progress(HEADS[few], "attention"):
        heads.append([d, *(_attention(T, d, repeats) for T in CONTEXTS[few])])
    maps: List[List[Any]] = [["rows", *(f"{inputs} -> {outputs}" for inputs, outputs in MAPS)]]
    for rows in progress(ROWS[few], "linear maps"):
        maps.append([rows, *(_linear(rows, *of, repeats) for of in MAPS[few])])
    tables: Dict[str, Sequence[Sequence[Any]]] = {
        f"A layer's forward and backward, native over runs, E {EXPERTS}": both,
        "Its forward alone, without gradients": forward,
        "Small experts (d 64, F 128, k 1), forward and backward, grouped over native": grouped,
        f"Attention at inference, ours over torch's, {SAMPLES} samples, {WIDTH} numbers in all heads": heads,
        "A linear map, our product over torch's": maps,
    }
    report("native", tables, {"rounds": repeats})


def _layer(D: int, hidden: int, E: int, K: int, tokens: int, base: str, other: str, repeats: int) -> Sequence[float]:
    """Time with the backend *other* over that with *base*: forward and backward, forward alone."""
    x, dy = torch.randn(tokens, D, requires_grad=True), torch.randn(tokens, D)
    layers = {name: Ours(D, hidden, E, K, backend=name) for name in (base, other)}
    steps = {name: partial(step, layer, x, dy) for name, layer in layers.items()}
    with_gradients = _ratio(steps, base, other, repeats, renew=partial(draw, x))
    with torch.no_grad():
        calls = {name: partial(layer.eval(), x) for name, layer in layers.items()}
        return with_gradients, _ratio(calls, base, other, repeats, renew=partial(draw, x))


@torch.no_grad()
def _attention(T: int, d: int, repeats: int) -> float:
    inputs = [torch.randn(T, SAMPLES, WIDTH // d, d) for _ in range(3)]
    ways = {
        "torch": partial(attention.causal_attention, *inputs, training=True),
        "ours": partial(attention._native, *inputs),
    }
    return _ratio(ways, "torch", "ours", repeats, number=max(1, 256 // T))


@torch.no_grad()
def _linear(rows: int, inputs: int, outputs: int, repeats: int) -> float:
    x, weight, bias = torch.randn(rows, inputs), torch.randn(outputs, inputs), torch.randn(outputs)
    ours = partial(NativeRunProducts.rows, Rows(x), weight, bias, transposed=True)
    ways = {"torch": partial(F.linear, x, weight, bias), "ours": ours}
    return _ratio(ways, "torch", "ours", repeats, number=max(1, 4096 // rows))


def _ratio(ways: Dict[str, Callable[[], Any]], base: str, other: str, repeats: int, **more: Any) -> float:
    seconds = medians(interleaved(ways, repeats, **more))
    return seconds[other] / seconds[base]


if __name__ == "__main__":
    main()
