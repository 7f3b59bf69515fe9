"""What a trained model's routing looks like on a text: numbers only.

Dimensions: T tokens, D model, E experts, K experts per token, V symbols, L MoE layers.
"""

from typing import Any, Dict, List, NamedTuple

import torch
from torch import Tensor

from fairseq_hyperrouter.routing import Routing

from .evaluation import Evaluator
from .layer_numbers import SAMPLE, of_experts, of_routing
from .observation import observed
from .seen import Seen, at, seen_tokens, together

TOP_TOKENS = 12
TOKENS = 20_000
"""Of the text, at most, that routing is looked at."""


class Inspection(NamedTuple):
    """Of one checkpoint at one K."""

    layers: List[Dict[str, Any]]
    """Numbers of each MoE layer, as JSON takes them."""
    chosen: List[Tensor]
    """(T, E) bool per layer, which experts each token of the text has."""
    token_ids: Tensor
    """(T,) which tokens these are."""


@torch.no_grad()
def inspect(evaluator: Evaluator, top_k: int) -> Inspection:
    """Look at the routing of the text with *top_k* experts per token.

    At every n-th token of the whole text, n so that there are at most TOKENS; what compares outputs (similarity, ranks)
    at SAMPLE of these. Which tokens depends on the text alone.
    """
    lengths = torch.as_tensor(evaluator.task.dataset(evaluator.split).sizes).long()
    starts, total = lengths.cumsum(0) - lengths, int(lengths.sum())
    every = -(-total // TOKENS)
    every_of_sample = every * -(-total // every // SAMPLE)
    seen: List[List[Seen]] = [[] for _ in evaluator.layers]
    sample: List[List[Seen]] = [[] for _ in evaluator.layers]

    with evaluator.model.at_top_k(top_k):
        for batch in evaluator.batches(f"{evaluator.label}: routing"):
            length = batch["net_input"]["src_tokens"].size(1)
            number = (starts[batch["id"]] + torch.arange(length)[:, None]).flatten().to(evaluator.device)

            def keep(
                layer: int, x: Tensor, arguments: Dict[str, Any], routing: Routing, number: Tensor = number
            ) -> None:
                tokens = seen_tokens(number, x, arguments, routing)
                sample[layer].append(at(tokens, tokens.number % every_of_sample == 0))
                # of the tokens themselves all are kept, what is wide of the sample only
                seen[layer].append(at(tokens._replace(x=tokens.x[:, :0], state=None), tokens.number % every == 0))

            with observed(evaluator.layers, keep):
                evaluator.forward(batch)
    dictionary = evaluator.task.target_dictionary
    whole, parts = map(together, seen), map(together, sample)
    found = list(zip(evaluator.layers, whole, parts))
    layers = [
        {**of_routing(one), **of_experts(layer, part, top_k), "top_tokens": _top_tokens(one, dictionary)}
        for layer, one, part in found
    ]
    return Inspection(layers, [one.routing.chosen_mask() for _, one, _ in found], found[0][1].token_ids)


def _top_tokens(seen: Seen, dictionary: Any) -> List[List[Dict[str, Any]]]:
    """For every expert the symbols that it takes most of beyond its share: the largest count log(share / expected)."""
    V, chosen = len(dictionary), seen.routing.chosen_mask()
    E = chosen.size(1)
    counts = torch.zeros(V, E, dtype=torch.double, device=seen.token_ids.device)
    counts.index_add_(0, seen.token_ids, chosen.double())
    occurrences = torch.bincount(seen.token_ids, minlength=V).double()
    expected = counts.sum(0) / counts.sum()  # of each expert
    share = counts / counts.sum(1, keepdim=True).clamp(min=1)
    score = counts * (share / expected.clamp(min=1e-300)).clamp(min=1e-300).log()
    found = []
    for expert in range(E):
        best = score[:, expert].topk(min(TOP_TOKENS, V)).indices.tolist()
        found.append(
            [
                {
                    "token": dictionary[symbol],
                    "count": int(counts[symbol, expert]),
                    "share": (counts[symbol, expert] / occurrences[symbol]).item(),
                }
                for symbol in best
                if score[symbol, expert] > 0
            ]
        )
    return found
