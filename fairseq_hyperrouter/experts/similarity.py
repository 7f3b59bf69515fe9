"""SimSMoE (Do et al., arXiv 2406.15883): experts that compute the same things are penalised.

Dimensions: T tokens, D model, E experts, n tokens of a pair.
"""

from typing import Callable

import torch
from torch import Tensor

PAIRS, TOKENS, LEAST_TOKENS, THRESHOLD = 4, 128, 16, 0.5


def cka(a: Tensor, b: Tensor) -> Tensor:
    """Linear centred kernel alignment of (n, D) outputs (arXiv 1905.00414): 1 for equal ones, about 0 for unrelated.

    HSIC(K, L) / sqrt(HSIC(K, K) HSIC(L, L)), K = A A^T, L = B B^T, with the unbiased estimator of HSIC (Song et al.
    2012): the usual one is near 1 for any two outputs where n is not much larger than D.

    That is the cosine of the two matrices after U-centring (Szekely and Rizzo, arXiv 1310.2926), and so never outside
    -1 .. 1, whereas HSIC added up from its three large sums is all rounding where the outputs are nearly constant.
    """
    return torch.cosine_similarity(centred_gram(a).flatten(), centred_gram(b).flatten(), dim=0)


def centred_gram(a: Tensor) -> Tensor:
    """(n, n) U-centred A A^T: rows and columns add up to 0 without the diagonal, which is 0. A shift of A drops out."""
    n = len(a)
    a = a - a.mean(dim=0)
    off_diagonal = 1 - torch.eye(n, dtype=a.dtype, device=a.device)
    k = (a @ a.t()) * off_diagonal
    of_rows = k.sum(dim=1) / (n - 2)
    return (k - of_rows[:, None] - of_rows + of_rows.sum() / (n - 1)) * off_diagonal


def similarity_penalty(x: Tensor, chosen: Tensor, expert: Callable[[Tensor, int], Tensor]) -> Tensor:
    """The mean similarity of pairs of experts on the tokens that both have.

    1. Of the pairs that share at least 16 tokens, take the four that share most.
    2. Run both experts on these tokens, at most 128 of them; CKA of the outputs.
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
            both = (chosen[:, i] & chosen[:, j]).nonzero().squeeze(1)
            rows = x[both[:: -(-len(both) // TOKENS)]]  # spread over the batch
            similarities.append(cka(expert(rows, i).float(), expert(rows, j).float()))
    if not similarities:
        return x.new_zeros((), dtype=torch.float32)
    values = torch.stack(similarities)
    return values.where(values > THRESHOLD, 0.0).mean()
