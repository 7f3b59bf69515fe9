"""What is measured of a trained model, beside the metrics of its Routings: pure functions of tensors.

Dimensions: T tokens, D model, F hidden, E experts, K experts per token, V symbols.
"""

from typing import Callable

import torch
from torch import Tensor


def changed(one: Tensor, other: Tensor) -> Tensor:
    """0-dim: the share of tokens whose set of experts, (T, E) bool, is another in the second."""
    return (one != other).any(-1).double().mean()


def cosines(items: Tensor) -> Tensor:
    """(E, E) cosine of the angle between every two of E tensors taken as vectors; 0 to one that is 0."""
    rows = items.double().flatten(1)
    products = rows @ rows.t()
    norms = products.diagonal().sqrt().clamp(min=1e-300)
    return products / norms / norms[:, None]


def effective_rank(rows: Tensor) -> Tensor:
    """0-dim: exp of the entropy of the singular values over their sum (Roy and Vetterli, EUSIPCO 2007).

    D for rows that fill all D dimensions evenly, 1 for multiples of one row.
    """
    values = torch.linalg.svdvals(rows.double())
    share = values / values.sum().clamp(min=1e-300)
    return torch.special.entr(share).sum().exp()


def numerical_rank(rows: Tensor, tolerance: float = 1e-6) -> Tensor:
    """(...) how many singular values of (..., N, D) are above *tolerance* times the largest."""
    values = torch.linalg.svdvals(rows.double())
    return (values > tolerance * values[..., :1]).sum(-1)


def gate_jacobian(gates: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    """(T, E, D) dg_i/dx at each of the (T, D) tokens *x*.

    Args:
        gates: (T, D) -> (T, E), for every token by itself; 0 for experts that are not chosen.
    """
    with torch.enable_grad():
        x = x.detach().requires_grad_()
        gate = gates(x)
        if not gate.requires_grad:  # it does not depend on the token
            return gate.new_zeros(*gate.shape, x.size(1))
        of_one = [torch.autograd.grad(g, x, retain_graph=True, materialize_grads=True)[0] for g in gate.sum(0)]
    return torch.stack(of_one, dim=1)


def routing_jacobian(of_gates: Tensor, outputs: Tensor) -> Tensor:
    """(T, min(D, E), D) the term of the layer's Jacobian that passes through its gates, up to a rotation.

    The layer is y = sum_i g_i(x) FFN_i(x), so J = sum_i g_i dFFN_i/dx + O^T G, the rows of O being FFN_i(x) and those
    of G dg_i/dx. With gates softmax(W x) that term is sum_j g_j (FFN_j(x) - y) w_j^T: its rows lie in the span of at
    most E rows of W (X-MoE, arXiv 2204.09179), and a token that has to please the router loses the other dimensions.
    That is what representation collapse means.

    Here R G is returned, O^T = Q R: it has the singular values and the span of O^T G, and min(D, E) rows in place of D.

    Args:
        of_gates: (T, E, D), G.
        outputs: (T, E, D), O.
    """
    return torch.linalg.qr(outputs.transpose(1, 2).to(of_gates), mode="r").R @ of_gates
