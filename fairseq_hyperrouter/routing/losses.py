"""Auxiliary losses of a Routing, and the sums that they and metrics are made of.

Dimensions: T tokens, E experts, K experts per token. Padding counts nowhere.
All are pure functions of a Routing. Those that return a sum are added up over layers, micro-batches and
workers first and divided afterwards, so that what is reported is exact for the whole batch.
"""

from typing import Optional

import torch
from torch import Tensor

from .metrics import entropy
from .routing import Routing


def num_tokens(routing: Routing) -> Tensor:
    """How many tokens count, a 0-dim float32 tensor."""
    if routing.token_mask is None:
        return torch.full((), float(routing.logits.size(0)), device=routing.logits.device)
    return routing.token_mask.sum(dtype=torch.float32)


def sum_over_tokens(routing: Routing, per_token: Tensor) -> Tensor:
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
    return sum_over_tokens(routing, routing.logits.softmax(dim=-1))


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
    return sum_over_tokens(routing, routing.logits.logsumexp(dim=-1).square())


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
    return (mean * log).sum() + sum_over_tokens(routing, entropy(routing)) / tokens
