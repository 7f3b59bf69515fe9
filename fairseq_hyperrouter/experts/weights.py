"""What every backend multiplies with."""

from typing import NamedTuple

from torch import Tensor


class ExpertWeights(NamedTuple):
    """The stacked weights of E experts, D -> F -> D; x W1 + b1, so no transposes."""

    weight1: Tensor
    """(E, D, F)"""
    bias1: Tensor
    """(E, F)"""
    weight2: Tensor
    """(E, F, D)"""
    bias2: Tensor
    """(E, D)"""
