"""What is measured of a trained model, beside the metrics of its Routings: pure functions of tensors.

Dimensions: T tokens, D model, F hidden, E experts, K experts per token, V symbols.
"""

from typing import Callable

import torch
from torch import Tensor


def changed(one: Tensor, other: Tensor) -> Tensor:
    """0-dim: the share of tokens whose set of experts, (T, E) bool, is another in the second."""
    return (one != other).any(-1).double().mean()


def pairwise(measure: Callable[[Tensor, Tensor], Tensor], items: Tensor) -> Tensor:
    """(E, E) a symmetric *measure* of every pair of the E *items*."""
    E = len(items)
    matrix = torch.eye(E, dtype=torch.float64)
    for i in range(E):
        for j in range(i + 1):
            matrix[i, j] = matrix[j, i] = measure(items[i], items[j])
    return matrix


def cosine(one: Tensor, other: Tensor) -> Tensor:
    """0-dim: cosine of the angle between two tensors taken as vectors."""
    return torch.cosine_similarity(one.double().flatten(), other.double().flatten(), dim=0)


def effective_rank(rows: Tensor) -> Tensor:
    """0-dim: exp of the entropy of the singular values over their sum (Roy and Vetterli, EUSIPCO 2007).

    D for rows that fill all D dimensions evenly, 1 for multiples of one row.
    """
    values = torch.linalg.svdvals(rows.double())
    share = values / values.sum().clamp(min=1e-300)
    return torch.special.entr(share).sum().exp()


def numerical_rank(rows: Tensor, tolerance: float = 1e-6) -> int:
    """How many singular values are above *tolerance* times the largest."""
    values = torch.linalg.svdvals(rows.double())
    return int((values > tolerance * values[0]).sum()) if len(values) and values[0] > 0 else 0


def routing_jacobian(gates: Callable[[Tensor], Tensor], outputs: Tensor, x: Tensor) -> Tensor:
    """(D, D) the term of the layer's Jacobian at one token that passes through its gates: sum_i FFN_i(x) dg_i/dx.

    The layer is y = sum_i g_i(x) FFN_i(x), so J = sum_i g_i dFFN_i/dx + this term. With gates softmax(W x) it is
    sum_j g_j (FFN_j(x) - y) w_j^T: its rows lie in the span of at most E rows of W (X-MoE, arXiv 2204.09179), and a
    token that has to please the router loses the other dimensions. That is what representation collapse means.

    Args:
        gates: (D,) -> (E,), 0 for experts that are not chosen.
        outputs: (E, D), FFN_i(x).
        x: (D,)
    """
    of_gates = torch.autograd.functional.jacobian(gates, x)  # (E, D)
    return outputs.t().double() @ of_gates.double()
