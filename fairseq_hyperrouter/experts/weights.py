"""What every backend multiplies with."""

from typing import Callable, NamedTuple

import torch
from torch import Tensor
from torch.autograd import forward_ad


class ExpertWeights(NamedTuple):
    """The stacked weights of E experts, D -> F -> D, for x W1 + b1 and h W2 + b2.

    ``nn.Linear`` holds the transpose. Products with this one are faster where an expert has few rows.
    """

    weight1: Tensor
    """(E, D, F)"""
    bias1: Tensor
    """(E, F)"""
    weight2: Tensor
    """(E, F, D)"""
    bias2: Tensor
    """(E, D)"""


class Hidden(NamedTuple):
    """What happens between the two products of an expert."""

    activation: Callable[[Tensor], Tensor]
    dropout: float
    """Probability of dropping a hidden unit in this call."""


def trains(*tensors: Tensor) -> bool:
    """Whether a backward pass through a function of *tensors* may come, so that something must be kept for it."""
    return torch.is_grad_enabled() and any(tensor.requires_grad for tensor in tensors)


def has_tangents(*tensors: Tensor) -> bool:
    """Whether forward-mode differentiation goes through *tensors*."""
    return forward_ad._current_level >= 0 and any(forward_ad.unpack_dual(t).tangent is not None for t in tensors)


def product_dtype(x: Tensor) -> torch.dtype:
    """In which a product with *x* is computed: with autocast another than that of *x*. An empty product tells."""
    return torch.mm(x.new_empty(0, 0), x.new_empty(0, 0)).dtype


def sum_dtype(x: Tensor) -> torch.dtype:
    """In which a token's expert outputs are added up: float32 where they are shorter, whatever k is."""
    return torch.promote_types(x.dtype, torch.float32)
