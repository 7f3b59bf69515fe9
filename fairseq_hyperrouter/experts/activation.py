"""Activations of the hidden units, with their gradients written out.

A backend with a backward pass of its own keeps one tensor per activation, and works in place on what nobody needs
any more: at these sizes an elementwise step over fresh memory costs as much as a matrix product.
"""

from typing import Callable, Dict, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fairseq_hyperrouter.errors import UserError


class Activation(NamedTuple):
    """One activation, as a backward pass of its own needs it."""

    apply: Callable[[Tensor], Tensor]
    """Pre-activation -> activation; overwrites the former when the latter is what is kept."""
    backward: Callable[[Tensor, Tensor], Tensor]
    """(gradient of the activation, what was kept) -> gradient of the pre-activation; may overwrite the first."""
    keeps_output: bool
    """Whether the activation is kept for the backward pass, with what dropout made of it, or the pre-activation."""


def _relu_backward(gradient: Tensor, activated: Tensor) -> Tensor:
    return torch.ops.aten.threshold_backward.grad_input(gradient, activated, 0, grad_input=gradient)


_WRITTEN_OUT: Dict[Callable[[Tensor], Tensor], Activation] = {
    F.relu: Activation(torch.relu_, _relu_backward, keeps_output=True),
    F.gelu: Activation(F.gelu, torch.ops.aten.gelu_backward, keeps_output=False),
    F.silu: Activation(F.silu, torch.ops.aten.silu_backward, keeps_output=False),
}


def check_activation(function: Callable[[Tensor], Tensor]) -> None:
    """Raise a UserError (a ValueError) for an activation that not every backend computes right."""
    if isinstance(function, nn.Module) and next(function.parameters(), None) is not None:
        raise UserError(f"activation {function}: has parameters, which would not be trained")
    values = torch.tensor([-9.0, 9.0])
    function(values)
    if values.tolist() != [-9.0, 9.0]:
        raise UserError(f"activation {function}: works in place; take the one that does not")


def with_gradient(function: Callable[[Tensor], Tensor]) -> Activation:
    """The Activation of any elementwise *function*; autograd gives the gradient of one that is not written out."""

    def backward(gradient: Tensor, before: Tensor) -> Tensor:
        with torch.enable_grad():
            before = before.detach().requires_grad_()
            return torch.autograd.grad(function(before), before, gradient)[0]

    return _WRITTEN_OUT.get(function) or Activation(function, backward, keeps_output=False)
