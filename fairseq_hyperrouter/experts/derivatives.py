"""Backward passes that are written out, and end there."""

from functools import wraps
from typing import Any, Callable

import torch


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
