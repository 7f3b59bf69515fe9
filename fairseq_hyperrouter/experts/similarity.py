"""SimSMoE (Do et al., arXiv 2406.15883): experts that compute the same things are penalised.

Dimensions: T tokens, D model, E experts, n tokens of a pair.
"""

from typing import Callable

import torch
from torch import Tensor

PAIRS, TOKENS, LEAST_TOKENS, THRESHOLD = 4, 128, 16, 0.5


def cka(a: Tensor, b: Tensor) -> Tensor:
    """Linear centred kernel alignment of (n, D) outputs (arXiv 1905.00414): 1 for equal ones, 0 for unrelated ones.

    ||A^T B||^2 / (||A^T A|| ||B^T B||), Frobenius norms, columns centred.
    """
    a, b = a - a.mean(0), b - b.mean(0)
    return (a.t() @ b).square().sum() / ((a.t() @ a).norm() * (b.t() @ b).norm()).clamp(min=1e-12)


def similarity_penalty(x: Tensor, chosen: Tensor, expert: Callable[[Tensor, int], Tensor]) -> Tensor:
    """The mean similarity of pairs of experts on the tokens that both have.

    1. Of the pairs that share at least 16 tokens, take the four that share most.
    2. Run both experts on (at most 128 of) these tokens; CKA of the outputs.
    3. The mean over the pairs of those above 0.5; 0 when there is none.

    Args:
        x: (T, D).
        chosen: (T, E) bool, which experts each token has.
        expert: (rows (n, D), which) -> (n, D).
    """
    float_chosen = chosen.to(x.dtype)
    shared = (float_chosen.t() @ float_chosen).triu(diagonal=1)
    counts, pairs = shared.flatten().topk(min(PAIRS, shared.numel()))
    similarities = []
    for count, pair in zip(counts.tolist(), pairs.tolist()):
        if count >= LEAST_TOKENS:
            i, j = divmod(pair, shared.size(1))
            rows = x[(chosen[:, i] & chosen[:, j]).nonzero().squeeze(1)[:TOKENS]]
            similarities.append(cka(expert(rows, i).float(), expert(rows, j).float()))
    if not similarities:
        return x.new_zeros((), dtype=torch.float32)
    values = torch.stack(similarities)
    return values.where(values > THRESHOLD, 0.0).mean()
