"""One layer on few tokens and without gradients, as in generation, beside a dense feed-forward.

python -m benchmarks.generation [--quick]
"""

from itertools import cycle
from typing import Any, Callable, List

import torch
from torch import Tensor, nn

from fairseq_hyperrouter import HyperRouter, LinearRouter, MoELayer

from .harness import interleaved, medians, parser, progress, report
from .layer import SHAPES
from .peers import Dense, RawGroupedMM

TOKENS = (1, 4, 16, 64, 256)


@torch.no_grad()
def main() -> None:
    """Measure, print and write the table."""
    quick = parser(__doc__).parse_args().quick
    tables, details = {}, {}
    for D, hidden in SHAPES[:1] if quick else SHAPES:
        rows = [["tokens", "k", "dense (us)", "smoe", "hyperrouter", "raw grouped_mm, no biases", "products alone"]]
        for tokens in progress(TOKENS, f"d {D}, F {hidden}"):
            for K in (1, 2):
                seconds = _measure(tokens, D, hidden, K, repeats=2 if quick else 9)
                limit = seconds["dense"]
                ratios = [seconds[name] / limit for name in list(seconds)[1:]]
                rows.append([tokens, K, round(limit * 1e6), *ratios])
                details[f"T {tokens}, d {D}, F {hidden}, k {K}"] = seconds
        tables[f"Time over that of the dense feed-forward of width k F, d {D}, F {hidden}, E 16"] = rows
    report("generation", tables, details)


def _measure(tokens: int, D: int, hidden: int, K: int, repeats: int) -> dict:
    inputs = [torch.randn(tokens, D) for _ in range(16)]  # a token after the other, with other experts
    layers = {"dense": Dense(D, hidden, 16, K)}
    for name, router in (("smoe", LinearRouter), ("hyperrouter", HyperRouter)):
        layers[name] = MoELayer(router(D, 16), hidden, top_k=K).eval()
    for name in ("smoe", "hyperrouter"):
        for module in layers[name].modules():
            if hasattr(module, "make_generation_fast_"):
                module.make_generation_fast_()  # as fairseq-generate does
    layers["raw"] = RawGroupedMM(D, hidden, 16, K)
    functions = {name: _in_turns(layer, inputs) for name, layer in layers.items()}
    bank = layers["smoe"].experts
    counts = layers["smoe"](inputs[0])[1].expert_index.flatten().bincount(minlength=16).tolist()
    rows, hidden_rows = torch.randn(tokens * K, D).split(counts), torch.randn(tokens * K, hidden).split(counts)
    products = [(a, w1, h, w2) for a, w1, h, w2 in zip(rows, bank.weight1, hidden_rows, bank.weight2) if len(a)]
    functions["products"] = lambda: [(torch.mm(a, w1), torch.mm(h, w2)) for a, w1, h, w2 in products]
    return medians(interleaved(functions, repeats, number=max(3, 200 // tokens)))


def _in_turns(layer: nn.Module, inputs: List[Tensor]) -> Callable[[], Any]:
    following = cycle(inputs)
    return lambda: layer(next(following))


if __name__ == "__main__":
    main()
