"""What is measured of a trained router and its experts: pure functions of tensors.

Dimensions: T tokens, D model, F hidden, E experts, K experts per token, V symbols.
"""

import math
from typing import Callable

import torch
from torch import Tensor


def entropy(logits: Tensor) -> Tensor:
    """(T,) entropy of the softmax over all E experts, in nats: from 0, sure of one expert, to ln E."""
    log_p = logits.double().log_softmax(-1)
    return -(log_p.exp() * log_p).sum(-1)


def normalised_entropy(logits: Tensor) -> Tensor:
    """(T,) the entropy over ln E, from 0 to 1."""
    return entropy(logits) / math.log(max(2, logits.size(-1)))


def inner_balance(logits: Tensor) -> Tensor:
    """(T,) p1 / p2, the probability of the best expert over that of the second (RMoE, arXiv 2408.06793)."""
    two = logits.double().topk(2, dim=-1).values
    return (two[..., 0] - two[..., 1]).exp()


def outer_balance(logits: Tensor, expert_index: Tensor) -> Tensor:
    """(T,) the probability of the chosen experts together, by the softmax over all (RMoE, arXiv 2408.06793)."""
    return logits.double().softmax(-1).gather(-1, expert_index).sum(-1)


def margin(logits: Tensor, top_k: int) -> Tensor:
    """(T,) by how much the K-th largest logit is above the next: what it takes to change the experts of a token."""
    largest = logits.double().topk(top_k + 1, dim=-1).values
    return largest[..., -2] - largest[..., -1]


def coefficient_of_variation(load: Tensor) -> Tensor:
    """0-dim: standard deviation over mean of the (E,) tokens per expert; 0 when even."""
    return load.double().std(unbiased=False) / load.double().mean()


def max_violation(load: Tensor) -> Tensor:
    """0-dim: the load of the fullest expert over the mean, less 1; 0 when even (arXiv 2408.15664)."""
    return load.double().max() / load.double().mean() - 1


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
