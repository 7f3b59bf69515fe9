"""One layer on few tokens and without gradients, as in generation, beside a dense feed-forward.

python -m benchmarks.generation [--quick]
"""

from itertools import cycle
from typing import Any, Callable, Dict, List

import torch
from torch import Tensor, nn

from fairseq_hyperrouter import HyperRouter, LinearRouter, MoELayer

from .harness import interleaved, medians, parser, progress, report
from .layer import SHAPES
from .peers import RAW, Dense, RawGroupedMM
from .sizes import EXPERTS

TOKENS = (1, 4, 16, 64, 256)
TOP_KS = (1, 2)
INPUTS = 16
"""A token after the other, with other experts."""
ROUTERS = {"smoe": LinearRouter, "hyperrouter": HyperRouter}
PRODUCTS = "products alone"
COLUMNS = (*ROUTERS, RAW, PRODUCTS)


@torch.no_grad()
def main() -> None:
    """Measure, print and write the tables."""
    quick = parser(__doc__).parse_args().quick
    tables, details = {}, {}
    for D, hidden in SHAPES[:1] if quick else SHAPES:
        rows = [["tokens", "k", "dense (us)", *COLUMNS]]
        for tokens in progress(TOKENS, f"d {D}, F {hidden}"):
            for K in TOP_KS:
                seconds = _measure(tokens, D, hidden, K, repeats=2 if quick else 9)
                dense = seconds["dense"]
                rows.append([tokens, K, round(dense * 1e6), *(seconds[name] / dense for name in COLUMNS)])
                details[f"T {tokens}, d {D}, F {hidden}, k {K}"] = seconds
        shape = f"d {D}, F {hidden}, E {EXPERTS}"
        tables[f"Time over that of the dense feed-forward of width k F, {shape}"] = rows
    report("generation", tables, details)


def _measure(tokens: int, D: int, hidden: int, K: int, repeats: int) -> Dict[str, float]:
    inputs = [torch.randn(tokens, D) for _ in range(INPUTS)]
    ours = {name: MoELayer(router(D, EXPERTS), hidden, top_k=K).eval() for name, router in ROUTERS.items()}
    for layer in ours.values():
        for module in layer.modules():
            if hasattr(module, "make_generation_fast_"):
                module.make_generation_fast_()  # as fairseq-generate does
    layers = {"dense": Dense(D, hidden, EXPERTS, K), **ours, RAW: RawGroupedMM(D, hidden, EXPERTS, K)}
    functions = {name: _in_turns(layer, inputs) for name, layer in layers.items()}
    products = cycle([_products(ours["smoe"], x) for x in inputs])
    functions[PRODUCTS] = lambda: next(products)()
    return medians(interleaved(functions, repeats, number=max(3, 200 // tokens)))


def _products(layer: MoELayer, x: Tensor) -> Callable[[], Any]:
    """A call of the experts' products for x (T, D), on rows that are there already."""
    index = layer(x)[1].expert_index.flatten()
    counts = index.bincount(minlength=EXPERTS).tolist()
    weight1, weight2 = layer.experts.weight1, layer.experts.weight2
    rows, hidden_rows = (torch.randn(len(index), weight.size(1)).split(counts) for weight in (weight1, weight2))
    products = [(a, w1, h, w2) for a, w1, h, w2 in zip(rows, weight1, hidden_rows, weight2) if len(a)]
    return lambda: [(torch.mm(a, w1), torch.mm(h, w2)) for a, w1, h, w2 in products]


def _in_turns(layer: nn.Module, inputs: List[Tensor]) -> Callable[[], Any]:
    following = cycle(inputs)
    return lambda: layer(next(following))


if __name__ == "__main__":
    main()
