"""What is measured of a trained model, beside the metrics of its Routings: pure functions of tensors.

Dimensions: T tokens, D model, F hidden, E experts, K experts per token, V symbols.
"""

import math
from typing import Callable, Union

import torch
from torch import Tensor

from fairseq_hyperrouter.experts.similarity import centred_gram


def changed(one: Tensor, other: Tensor) -> Tensor:
    """0-dim: the share of tokens whose set of experts, (T, E) bool, is another in the second."""
    return (one != other).any(-1).double().mean()


def cosines(products: Tensor) -> Tensor:
    """(E, E) cosine of the angle between every two vectors of the inner *products* (E, E); NaN to one that is 0."""
    norms = products.diagonal().sqrt()
    return products / norms / norms[:, None]


def similarities(outputs: Tensor) -> Tensor:
    """(E, E) CKA of every two of (E, T, D) outputs, as ``experts/similarity.py`` has it.

    NaN where it has no meaning: with less than four tokens, and to outputs that are the same for every token.
    """
    outputs = outputs.double()
    if outputs.size(1) < 4:  # the U-centred matrix of three is 0
        return outputs.new_full((len(outputs), len(outputs)), math.nan)
    grams = torch.stack([centred_gram(one) for one in outputs]).flatten(1)
    constant = grams.norm(dim=1) <= 1e-12 * outputs.square().sum((1, 2))  # all rounding
    grams = grams.masked_fill(constant[:, None], 0.0)
    return cosines(grams @ grams.t())


def effective_rank(rows: Tensor) -> Tensor:
    """0-dim: exp of the entropy of the singular values over their sum (Roy and Vetterli, EUSIPCO 2007).

    D for rows that fill all D dimensions evenly, 1 for multiples of one row.
    """
    values = _singular_values(rows)
    share = values / values.sum().clamp(min=1e-300)
    return torch.special.entr(share).sum().exp()


def numerical_rank(rows: Tensor, noise: Union[Tensor, float] = 0.0, tolerance: float = 1e-6) -> Tensor:
    """(...) how many singular values of (..., N, D) are above *noise* (...) and *tolerance* times the largest.

    In float64, to have a NaN where an entry is not finite.
    """
    values = _singular_values(rows)
    count = ((values > tolerance * values[..., :1]) & (values > torch.as_tensor(noise)[..., None])).sum(-1)
    return torch.where(values.isfinite().all(-1), count.double(), math.nan)


def _singular_values(rows: Tensor) -> Tensor:
    """In float64; NaN where an entry is not finite, which torch refuses."""
    finite = rows.isfinite().all(-1).all(-1)
    return torch.linalg.svdvals(rows.double().nan_to_num(0.0, 0.0, 0.0)).masked_fill(~finite[..., None], math.nan)


def jacobians(function: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    """(T, E, D) of a *function* (T, D) -> (T, E) of every token by itself, at each of the tokens *x*."""
    with torch.enable_grad():
        x = x.detach().requires_grad_()
        y = function(x)
        if not y.requires_grad:  # it does not depend on the token
            return y.new_zeros(*y.shape, x.size(1))
        of_one = [torch.autograd.grad(column, x, retain_graph=True, materialize_grads=True)[0] for column in y.sum(0)]
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
