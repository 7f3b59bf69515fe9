"""What code that computes without autograd must know: whether somebody will ask for its derivatives."""

from functools import wraps
from typing import Any, Callable

import torch
from torch import Tensor
from torch.autograd import forward_ad


def trains(*tensors: Tensor) -> bool:
    """Whether a backward pass through a function of *tensors* may come, so that something must be kept for it."""
    return torch.is_grad_enabled() and any(tensor.requires_grad for tensor in tensors)


def has_tangents(*tensors: Tensor) -> bool:
    """Whether forward-mode differentiation goes through *tensors*."""
    return forward_ad._current_level >= 0 and any(forward_ad.unpack_dual(t).tangent is not None for t in tensors)


def differentiable_once(backward: Callable[..., Any]) -> Callable[..., Any]:
    """A ``backward`` of an autograd function that refuses ``create_graph=True``.

    torch's own ``once_differentiable`` does so only where the incoming gradient asks for one; elsewhere the second
    derivative is left out without a word.
    """

    @wraps(backward)
    def once(ctx: Any, *gradients: Any) -> Any:
        if torch.is_grad_enabled():
            raise RuntimeError("experts can be differentiated once; with backend='loop' as often as you like")
        return backward(ctx, *gradients)

    return once
