"""Auxiliary losses of a Routing: pure functions.

Dimensions: E experts, K experts per token.
"""

from typing import Optional

import torch
from torch import Tensor

from .metrics import entropy
from .routing import Routing
from .totals import expert_load, num_tokens, probability_sum, sum_over_tokens


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
