"""What a trained model's routing looks like on a text: numbers only.

Dimensions: T tokens, D model, E experts, K experts per token, V symbols, L MoE layers.
"""

import math
from typing import Any, Dict, Iterable, Iterator, List, NamedTuple, Optional, Sequence

import torch
from torch import Tensor

from fairseq_hyperrouter.experts.similarity import cka
from fairseq_hyperrouter.moe_layer import MoELayer
from fairseq_hyperrouter.routing import Routing, RoutingContext, metrics, totals

from . import measures
from .evaluation import Evaluator
from .observation import observed

TOP_TOKENS = 12
TOKENS = 20_000
"""Of the text, at most, that routing is looked at."""
SAMPLE = 256
"""Of these, about, whose outputs are compared."""
JACOBIANS = 64
"""Of the sample, about, whose routing term is computed."""


class Seen(NamedTuple):
    """What one MoE layer made of tokens."""

    number: Tensor
    """(T,) where in the text each stands."""
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
    """Numbers of each MoE layer, as JSON takes them. What is logged too has that name, less its moe_."""
    chosen: List[Tensor]
    """(T, E) bool per layer, which experts each token of the text has."""
    token_ids: Tensor
    """(T,) which tokens these are."""


@torch.no_grad()
def inspect(evaluator: Evaluator, top_k: int) -> Inspection:
    """Look at the routing of the text with *top_k* experts per token.

    At every n-th token of the whole text, n so that there are at most TOKENS; what compares outputs (similarity, ranks)
    at SAMPLE of these, the Jacobian at JACOBIANS of those. Which tokens depends on the text alone.
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
                tokens = _tokens(number, x, arguments, routing)
                sample[layer].append(_at(tokens, tokens.number % every_of_sample == 0))
                # of the tokens themselves all are kept, what is wide of the sample only
                seen[layer].append(_at(tokens._replace(x=tokens.x[:, :0], state=None), tokens.number % every == 0))

            with observed(evaluator.layers, keep):
                evaluator.forward(batch)
    dictionary = evaluator.task.target_dictionary
    whole, parts = map(_together, seen), map(_together, sample)
    found = list(zip(evaluator.layers, whole, parts))
    layers = [_layer(layer, one, part, top_k, dictionary) for layer, one, part in found]
    return Inspection(layers, [one.routing.chosen_mask() for _, one, _ in found], found[0][1].token_ids)


def _tokens(number: Tensor, x: Tensor, arguments: Dict[str, Any], routing: Routing) -> Seen:
    """Of one forward pass, padding left out."""
    seen = Seen(
        number,
        x.flatten(0, -2).float(),
        Routing(routing.logits, routing.expert_index, routing.gate, chosen=routing.chosen),
        arguments["token_ids"].reshape(-1),
        arguments.get("router_state"),
    )
    return seen if routing.token_mask is None else _at(seen, routing.token_mask)


def _at(seen: Seen, which: Tensor) -> Seen:
    """Some of the tokens, or all in another order."""

    def at(value: Optional[Tensor]) -> Optional[Tensor]:
        return None if value is None else value[which]

    return Seen(*(Routing(*map(at, one)) if isinstance(one, Routing) else at(one) for one in seen))


def _together(parts: Sequence[Seen]) -> Seen:
    """In the order of the text."""

    def joined(values: Iterable[Optional[Tensor]]) -> Optional[Tensor]:
        values = [value for value in values if value is not None]
        return torch.cat(values) if values else None

    number, x, routings, token_ids, states = zip(*parts)
    whole = Seen(*map(joined, (number, x)), Routing(*map(joined, zip(*routings))), *map(joined, (token_ids, states)))
    return _at(whole, whole.number.argsort())


def _layer(layer: MoELayer, seen: Seen, sample: Seen, top_k: int, dictionary: Any) -> Dict[str, Any]:
    routing, x = seen.routing, sample.x
    load, entropy = totals.expert_load(routing), metrics.entropy(routing).mean().item()
    E = len(load)
    outputs = layer.every_expert(x)  # (T, E, D)
    similarity = measures.pairwise(cka, outputs.transpose(0, 1).double())
    weights = torch.cat([layer.experts.weight1.flatten(1), layer.experts.weight2.flatten(1)], dim=1)
    cosine = measures.pairwise(measures.cosine, weights)
    terms = list(_routing_terms(layer, sample, outputs, top_k))
    others = ~torch.eye(E, dtype=torch.bool)
    return {
        "router_entropy": entropy,
        "normalised_entropy": entropy / math.log(max(2, E)),
        "inner_balance": metrics.log_inner_balance(routing).mean().exp().item(),
        "outer_balance": metrics.outer_balance(routing).mean().item(),
        "margin": metrics.margin(routing).mean().item(),
        "load": (load / load.sum()).tolist(),
        "load_imbalance": metrics.load_imbalance(load).item(),
        "load_cv": metrics.load_cv(load).item(),
        "unused_experts": int((load == 0).sum()),
        "mean_top_k": (load.sum() / totals.num_tokens(routing)).item(),
        "output_similarity": similarity.tolist(),
        "mean_output_similarity": similarity[others].mean().item() if E > 1 else None,
        "weight_similarity": cosine.tolist(),
        "mean_weight_similarity": cosine[others].mean().item() if E > 1 else None,
        "hidden_rank": measures.effective_rank(x - x.mean(0)).item(),
        "jacobian_rank": sum(map(measures.numerical_rank, terms)) / max(1, len(terms)),
        "jacobian_span": measures.numerical_rank(torch.cat(terms)) if terms else 0,
        "width": x.size(1),
        "top_tokens": _top_tokens(seen, dictionary),
    }


def _routing_terms(layer: MoELayer, seen: Seen, outputs: Tensor, top_k: int) -> Iterator[Tensor]:
    """The routing term of the Jacobian, (D, D), at every n-th token.

    In float64: the rounding of float32 gates is as large as the least singular values that count.
    """
    for token in range(0, len(outputs), -(-len(outputs) // JACOBIANS)):
        state = None if seen.state is None else seen.state[token : token + 1].double()
        context = RoutingContext(top_k, token_ids=seen.token_ids[token : token + 1], state=state)

        def gates(x: Tensor, context: RoutingContext = context) -> Tensor:
            routing = layer.router(x[None], context)
            kept = routing.gate if routing.kept is None else routing.gate * routing.kept
            return torch.zeros_like(routing.logits, dtype=kept.dtype).scatter(1, routing.expert_index, kept)[0]

        with torch.enable_grad():
            yield measures.routing_jacobian(gates, outputs[token], seen.x[token].double())


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
