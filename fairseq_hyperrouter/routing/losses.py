"""What a Routing says of itself: auxiliary losses and the sums that metrics are made of.

Dimensions: T tokens, E experts, K experts per token. Padding counts nowhere.
All are pure functions of a Routing. Those that return a sum are added up over layers, micro-batches and
workers first and divided afterwards, so that what is reported is exact for the whole batch.
"""

import math
from typing import Optional

import torch
from torch import Tensor

from .routing import Routing


def num_tokens(routing: Routing) -> Tensor:
    """How many tokens count, a 0-dim float32 tensor."""
    if routing.token_mask is None:
        return torch.full((), float(routing.logits.size(0)), device=routing.logits.device)
    return routing.token_mask.sum(dtype=torch.float32)


def _sum_over_tokens(routing: Routing, per_token: Tensor) -> Tensor:
    """Sum (T, ...) over the tokens that count."""
    if routing.token_mask is not None:
        mask = routing.token_mask.view(-1, *(1,) * (per_token.dim() - 1))
        per_token = per_token.masked_fill(~mask, 0.0)
    return per_token.sum(dim=0)


def expert_load(routing: Routing) -> Tensor:
    """(E,) float32: how many tokens chose each expert, those over a capacity included."""
    return routing.chosen_mask().sum(dim=0, dtype=torch.float32)


def probability_sum(routing: Routing) -> Tensor:
    """(E,) sum over tokens of softmax(z)."""
    return _sum_over_tokens(routing, routing.logits.softmax(dim=-1))


def balance(load: Tensor, probability: Tensor) -> Tensor:
    """E sum_i f_i P_i from (..., E) loads and probability sums; f and P are their shares.

    Switch Transformer (arXiv 2101.03961). 1 when both are uniform, whatever K; E when all goes to one expert.
    0 when there is no token.
    """
    f = load / load.sum(dim=-1, keepdim=True).clamp(min=1.0)
    p = probability / probability.sum(dim=-1, keepdim=True).clamp(min=1e-9)
    return load.size(-1) * (f * p).sum(dim=-1)


def balance_loss(routing: Routing, load: Optional[Tensor] = None) -> Tensor:
    """The load-balancing loss of one layer: its gradient flows through P, f is a constant.

    Args:
        load: (E,) loads that f is taken from, of a larger batch that this one is part of; default: this one's.
            Averaged over the parts, weighted by their tokens, the losses are then that of the larger batch.
    """
    load = expert_load(routing) if load is None else load
    return balance(load.detach(), probability_sum(routing))


def z_sum(routing: Routing) -> Tensor:
    """Sum over tokens of logsumexp(z)^2."""
    return _sum_over_tokens(routing, routing.logits.logsumexp(dim=-1).square())


def z_loss(routing: Routing) -> Tensor:
    """mean logsumexp(z)^2 (ST-MoE, arXiv 2202.08906)."""
    return z_sum(routing) / num_tokens(routing).clamp(min=1.0)


def mutual_information_loss(routing: Routing, share: Optional[Tensor] = None) -> Tensor:
    """-H(mean p) + mean H(p), p the softmax over all E experts (DS-MoE, arXiv 2404.05567).

    Lowest, -ln E, when every token is sure of its expert and all experts are used evenly.

    Args:
        share: (E,), the mean p of more tokens that these are some of, to take in the place of their own; its gradient
            is theirs. Averaged over the workers by tokens, the gradient is then that of all tokens together.
    """
    tokens = num_tokens(routing).clamp(min=1.0)
    mean = probability_sum(routing) / tokens
    mean = mean if share is None else mean + (share - mean).detach()
    log = mean.clamp(min=torch.finfo(mean.dtype).tiny).log()  # whose gradient at 0 is not NaN
    return (mean * log).sum() + entropy_sum(routing) / tokens


def entropy_sum(routing: Routing) -> Tensor:
    """Sum over tokens of the entropy of softmax(z) over all E experts, in nats."""
    log_p = routing.logits.log_softmax(dim=-1)
    return _sum_over_tokens(routing, -(log_p.exp() * log_p).sum(dim=-1))


def outer_balance_sum(routing: Routing) -> Tensor:
    """Sum over tokens of the probability of their chosen experts together (RMoE, arXiv 2408.06793)."""
    return _sum_over_tokens(routing, (routing.logits.softmax(dim=-1) * routing.chosen_mask()).sum(dim=-1))


def margin_sum(routing: Routing) -> Tensor:
    """Sum over tokens of the least logit that was chosen less the largest that was not; 0 where there is no other."""
    chosen = routing.chosen_mask()
    least = routing.logits.masked_fill(~chosen, math.inf).amin(dim=-1)
    largest = routing.logits.masked_fill(chosen, -math.inf).amax(dim=-1)
    return _sum_over_tokens(routing, (least - largest).masked_fill(chosen.all(dim=-1) | ~chosen.any(dim=-1), 0.0))


def dropped_sum(routing: Routing) -> Tensor:
    """How many assignments of tokens that count were not carried out."""
    if routing.kept is None:
        return torch.zeros((), device=routing.logits.device)
    dropped = ~routing.kept if routing.chosen is None else routing.chosen & ~routing.kept
    return _sum_over_tokens(routing, dropped.sum(dim=-1, dtype=torch.float32))
