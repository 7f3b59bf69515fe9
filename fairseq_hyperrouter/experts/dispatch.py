"""Order tokens by expert, and add the experts' outputs up again.

Dimensions: T tokens, D model, E experts, K experts per token, N = T K assignments.
"""

from typing import NamedTuple, Optional

import torch
from torch import Tensor


class Dispatch(NamedTuple):
    """The assignments in the order of their experts; those not carried out come last."""

    order: Tensor
    """(N,) int64: which assignment, an index into the flattened (T, K), stands at each place."""
    token: Tensor
    """(N,) int64: the token of the assignment at each place."""
    ends: Tensor
    """(E,) int64: expert i has the places ends[i - 1] to ends[i] - 1; ends[E - 1] are carried out."""


def order_by_expert(expert_index: Tensor, num_experts: int, kept: Optional[Tensor] = None) -> Dispatch:
    """Sort the (T, K) assignments by expert; within an expert the order of the tokens stays.

    Nothing is copied to the host.
    """
    expert_index_N = expert_index.reshape(-1)
    if kept is not None:
        expert_index_N = expert_index_N.masked_fill(~kept.reshape(-1), num_experts)
    sorted_N, order = expert_index_N.sort(stable=True)
    experts = torch.arange(num_experts, device=expert_index.device)
    ends = torch.searchsorted(sorted_N, experts, right=True)
    token = order.div(expert_index.size(1), rounding_mode="floor")
    return Dispatch(order, token, ends)


def combine(outputs: Tensor, dispatch: Dispatch, gate: Tensor, num_tokens: int) -> Tensor:
    """Sum the (n, D) outputs of the n assignments carried out, each times its gate, at their tokens: (T, D)."""
    n = outputs.size(0)
    weight = gate.reshape(-1)[dispatch.order[:n]].to(outputs.dtype)
    combined = outputs.new_zeros(num_tokens, outputs.size(1))
    return combined.index_add(0, dispatch.token[:n], outputs * weight[:, None])
