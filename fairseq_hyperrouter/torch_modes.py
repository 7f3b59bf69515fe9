"""What torch was asked for that code must know before it computes: gradients, forward-mode derivatives, autocast."""

import torch
from torch import Tensor
from torch.autograd import forward_ad


def trains(*tensors: Tensor) -> bool:
    """Whether a backward pass through a function of *tensors* may come, so that something must be kept for it."""
    return torch.is_grad_enabled() and any(tensor.requires_grad for tensor in tensors)


def has_tangents(*tensors: Tensor) -> bool:
    """Whether forward-mode differentiation goes through *tensors*."""
    return forward_ad._current_level >= 0 and any(forward_ad.unpack_dual(t).tangent is not None for t in tensors)


def product_dtype(x: Tensor) -> torch.dtype:
    """In which a product with *x* is computed: with autocast another than that of *x*. An empty product tells."""
    return torch.mm(x.new_empty(0, 0), x.new_empty(0, 0)).dtype
