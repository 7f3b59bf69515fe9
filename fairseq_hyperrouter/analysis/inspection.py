"""What a trained model's routing looks like on a text: numbers only.

Dimensions: T tokens, D model, E experts, K experts per token, V symbols, L MoE layers.
"""

import math
from typing import Any, Dict, Iterable, Iterator, List, NamedTuple, Optional, Sequence

import torch
from torch import Tensor

from fairseq_hyperrouter.experts.similarity import cka
from fairseq_hyperrouter.moe_layer import MoELayer
from fairseq_hyperrouter.routing import Routing, RoutingContext, losses, metrics

from . import statistics
from .evaluation import Evaluator
from .observation import observed

TOP_TOKENS = 12
JACOBIANS = 64
"""Tokens whose routing term is computed."""


class Seen(NamedTuple):
    """What one MoE layer made of the tokens of one batch, padding left out."""

    x: Tensor
    """(T, D)"""
    routing: Routing
    token_ids: Tensor
    """(T,)"""
    state: Optional[Tensor]
    """(T, S), what the router of the layer below handed on."""


class Inspection(NamedTuple):
    """Of one checkpoint at one K."""

    layers: List[Dict[str, Any]]
    """Numbers of each MoE layer, as JSON takes them."""
    chosen: List[Tensor]
    """(T, E) bool per layer, which experts each token of the text has."""


@torch.no_grad()
def inspect(evaluator: Evaluator, top_k: int, tokens: int = 20_000, sample: int = 256) -> Inspection:
    """Look at the first *tokens* of the text with *top_k* experts per token.

    What compares outputs (similarity, ranks) looks at the first *sample* tokens of these, the Jacobian at JACOBIANS.
    """
    seen: List[List[Seen]] = [[] for _ in evaluator.layers]
    found = 0

    def keep(layer: int, x: Tensor, arguments: Dict[str, Any], routing: Routing) -> None:
        one = _tokens(x, arguments, routing)
        # of the tokens themselves all are kept, of what is wide only the sample
        seen[layer].append(one if found < sample else one._replace(x=one.x[:0], state=None))

    with evaluator.model.at_top_k(top_k), observed(evaluator.layers, keep):
        for batch in evaluator.batches(f"{evaluator.label}: routing"):
            evaluator.forward(batch)
            found = sum(len(one.token_ids) for one in seen[0])
            if found >= tokens:
                break
    dictionary = evaluator.task.target_dictionary
    together = [_together(parts) for parts in seen]
    layers = [_layer(layer, one, top_k, sample, dictionary) for layer, one in zip(evaluator.layers, together)]
    return Inspection(layers, [one.routing.chosen_mask() for one in together])


def _tokens(x: Tensor, arguments: Dict[str, Any], routing: Routing) -> Seen:
    """Of one forward pass, padding left out."""
    x = x.flatten(0, -2)
    counts = torch.ones(len(x), dtype=torch.bool, device=x.device) if routing.token_mask is None else routing.token_mask
    chosen, state = routing.chosen, arguments.get("router_state")
    return Seen(
        x[counts].float(),
        Routing(
            routing.logits[counts],
            routing.expert_index[counts],
            routing.gate[counts],
            chosen=None if chosen is None else chosen[counts],
        ),
        arguments["token_ids"].reshape(-1)[counts],
        None if state is None else state[counts],
    )


def _together(parts: Sequence[Seen]) -> Seen:
    def joined(values: Iterable[Optional[Tensor]]) -> Optional[Tensor]:
        values = [value for value in values if value is not None]
        return torch.cat(values) if values else None

    x, routings, token_ids, states = zip(*parts)
    return Seen(joined(x), Routing(*map(joined, zip(*routings))), joined(token_ids), joined(states))


def _layer(layer: MoELayer, seen: Seen, top_k: int, sample: int, dictionary: Any) -> Dict[str, Any]:
    routing = seen.routing
    load, entropy = losses.expert_load(routing), metrics.entropy(routing).mean().item()
    E = len(load)
    x = seen.x[:sample]
    outputs = layer.every_expert(x)  # (T, E, D)
    similarity = statistics.pairwise(cka, outputs.transpose(0, 1).double())
    weights = torch.cat([layer.experts.weight1.flatten(1), layer.experts.weight2.flatten(1)], dim=1)
    cosine = statistics.pairwise(statistics.cosine, weights)
    terms = list(_routing_terms(layer, seen, outputs, top_k))
    others = ~torch.eye(E, dtype=torch.bool)
    return {
        "router_entropy": entropy,
        "normalised_entropy": entropy / math.log(max(2, E)),
        "inner_balance": metrics.inner_balance(routing).median().item(),
        "outer_balance": metrics.outer_balance(routing).mean().item(),
        "margin": metrics.margin(routing).mean().item(),
        "load": (load / load.sum()).tolist(),
        "coefficient_of_variation": metrics.load_cv(load).item(),
        "max_violation": metrics.load_imbalance(load).item() - 1,
        "unused_experts": int((load == 0).sum()),
        "mean_experts": (load.sum() / losses.num_tokens(routing)).item(),
        "output_similarity": similarity.tolist(),
        "mean_output_similarity": similarity[others].mean().item() if E > 1 else None,
        "weight_similarity": cosine.tolist(),
        "mean_weight_similarity": cosine[others].mean().item() if E > 1 else None,
        "hidden_rank": statistics.effective_rank(x - x.mean(0)).item(),
        "jacobian_rank": sum(map(statistics.numerical_rank, terms)) / max(1, len(terms)),
        "jacobian_span": statistics.numerical_rank(torch.cat(terms)) if terms else 0,
        "width": x.size(1),
        "top_tokens": _top_tokens(seen, dictionary),
    }


def _routing_terms(layer: MoELayer, seen: Seen, outputs: Tensor, top_k: int) -> Iterator[Tensor]:
    """The routing term of the Jacobian, (D, D), at the first tokens."""
    for token in range(min(JACOBIANS, len(outputs))):
        state = None if seen.state is None else seen.state[token : token + 1]
        context = RoutingContext(top_k, token_ids=seen.token_ids[token : token + 1], state=state)

        def gates(x: Tensor, context: RoutingContext = context) -> Tensor:
            routing = layer.router(x[None], context)
            kept = routing.gate if routing.kept is None else routing.gate * routing.kept
            return torch.zeros_like(routing.logits, dtype=kept.dtype).scatter(1, routing.expert_index, kept)[0]

        with torch.enable_grad():
            yield statistics.routing_jacobian(gates, outputs[token], seen.x[token])


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
