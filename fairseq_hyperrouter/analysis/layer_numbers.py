"""The numbers of one MoE layer, from what it made of tokens; None where one has no meaning.

Dimensions: T tokens, D model, E experts, K experts per token.
"""

import math
from typing import Any, Dict, List, Optional, Tuple

import torch
from torch import Tensor

from fairseq_hyperrouter.moe_layer import MoELayer
from fairseq_hyperrouter.routing import Limit, RoutingContext, metrics, totals

from . import measures
from .seen import Seen

LOOK_AT = 2
"""Experts per token, where nobody says another number."""
SAMPLE = 256
"""How many tokens, about, the experts are compared on."""
JACOBIANS = 64
"""Of these, about, whose routing term is computed."""

ROUNDING = 1e-15
"""Of float64, relative."""


def of_routing(seen: Seen) -> Dict[str, Any]:
    """What the Routing says. What training logs too has that name, less its moe_."""
    routing = seen.routing
    load, entropy = totals.expert_load(routing), metrics.entropy(routing).mean().item()
    return {
        "router_entropy": entropy,
        "normalised_entropy": entropy / metrics.largest_entropy(len(load)),
        "inner_balance": metrics.log_inner_balance(routing).mean().exp().item(),
        "outer_balance": metrics.outer_balance(routing).mean().item(),
        "margin": metrics.margin(routing).mean().item(),
        "load": metrics.load_shares(load).tolist(),
        "load_imbalance": metrics.load_imbalance(load).item(),
        "load_cv": metrics.load_cv(load).item(),
        "unused_experts": int((load == 0).sum()),
        "mean_top_k": (load.sum() / totals.num_tokens(routing)).item(),
    }


@torch.no_grad()
def of_experts(layer: MoELayer, sample: Seen, top_k: int, limit: Optional[Limit] = None) -> Dict[str, Any]:
    """What only the *layer* itself shows: how alike its experts are, and of what rank is what it sees and routes.

    Every expert computes every token of the *sample*. With experts that are divided over workers all of these call this
    together.
    """
    x, outputs = sample.x.double(), layer.every_expert(sample.x).double()  # (T, D), (T, E, D)
    similarity = measures.similarities(outputs.transpose(0, 1))
    cosine = measures.cosines(layer.experts.weight_products())
    terms, noise = _routing_terms(layer, sample, outputs, top_k, limit)
    return {
        "output_similarity": _numbers(similarity),
        "mean_output_similarity": _mean_of_others(similarity),
        "weight_similarity": _numbers(cosine),
        "mean_weight_similarity": _mean_of_others(cosine),
        "hidden_rank": _number(measures.effective_rank(x - x.mean(0))),
        "jacobian_rank": _number(measures.numerical_rank(terms, noise).mean()),
        "jacobian_span": _number(measures.numerical_rank(terms.flatten(0, 1), noise.amax())),
        "width": x.size(1),
    }


def _mean_of_others(similarity: Tensor) -> Optional[float]:
    return _number(similarity[~torch.eye(len(similarity), dtype=torch.bool, device=similarity.device)].nanmean())


def _number(value: Tensor) -> Optional[float]:
    return value.item() if value.isfinite() else None


def _numbers(matrix: Tensor) -> List[List[Optional[float]]]:
    return [[one if math.isfinite(one) else None for one in row] for row in matrix.tolist()]


def _routing_terms(
    layer: MoELayer, seen: Seen, outputs: Tensor, top_k: int, limit: Optional[Limit]
) -> Tuple[Tensor, Tensor]:
    """measures.routing_jacobian at every n-th token (T, N, D), and what of each is rounding (T,).

    In float64: the rounding of float32 gates is as large as the least singular values that count. Where a router is so
    sharp that 1 - gate is lost to rounding, the term is all rounding of the logits' part of it, and counts for nothing.
    """
    some = slice(None, None, max(1, -(-len(outputs) // JACOBIANS)))
    state = None if seen.state is None else seen.state[some].double()
    context = RoutingContext(top_k, token_ids=seen.token_ids[some], state=state, limit=limit)

    def gates(x: Tensor) -> Tensor:
        routing = layer.router(x, context)
        kept = routing.gate if routing.kept is None else routing.gate * routing.kept
        return torch.zeros_like(routing.logits, dtype=kept.dtype).scatter(1, routing.expert_index, kept)

    x, outputs = seen.x[some].double(), outputs[some]
    of_logits = measures.jacobians(lambda x: layer.router(x, context).logits, x)
    noise = ROUNDING * outputs.norm(dim=(1, 2)) * of_logits.norm(dim=(1, 2))
    return measures.routing_jacobian(measures.jacobians(gates, x), outputs), noise
