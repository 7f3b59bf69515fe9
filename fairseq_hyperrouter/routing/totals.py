"""Sums over the tokens of a Routing that losses and metrics are made of: pure functions.

Dimensions: T tokens, E experts. Padding counts nowhere. They are added up over layers, micro-batches and workers first
and divided afterwards, so that what is reported is exact for the whole batch.
"""

import torch
from torch import Tensor

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
