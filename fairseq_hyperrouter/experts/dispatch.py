"""Order assignments by expert.

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
    expert: Tensor
    """(N,) int64: the expert of the assignment at each place; E where it is not carried out."""
    ends: Tensor
    """(E,) int64: expert i has the places ends[i - 1] to ends[i] - 1; ends[E - 1] are carried out."""
    is_whole: bool
    """Whether all assignments are known to be carried out, so that the last end is N."""


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
    return Dispatch(order, token, sorted_N, ends, kept is None)


def places(dispatch: Dispatch) -> Tensor:
    """(N,) int64: at which place each assignment stands."""
    place = torch.empty_like(dispatch.order)
    place[dispatch.order] = torch.arange(place.numel(), device=place.device)
    return place


def sum_of_assignments(rows: Tensor, place: Tensor, shape: torch.Size) -> Tensor:
    """(N, D) rows in the order of the experts -> (T, D): of each token, the sum of its K rows; *shape* is (T, K)."""
    return rows.index_select(0, place).view(*shape, rows.size(1)).sum(1)
