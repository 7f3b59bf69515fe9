"""What every backend multiplies with."""

from typing import Callable, NamedTuple

import torch
from torch import Tensor


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


def sum_dtype(x: Tensor) -> torch.dtype:
    """In which rows of x are added up, as a token's expert outputs: float32 where theirs is shorter, whatever k is."""
    return torch.promote_types(x.dtype, torch.float32)
