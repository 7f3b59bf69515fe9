"""GShard's top-2 router (Lepikhin et al., arXiv 2006.16668).

Dimensions: T tokens, D model, E experts, K experts per token.
"""

import torch
from torch import Tensor

from ..router import register_router
from .linear import LinearRouter


@register_router("gshard")
class GShardRouter(LinearRouter):
    """The best expert, and in training the others by chance.

    1. z = x W^T + b, (T, E).
    2. The first expert is the largest entry of z. The others are drawn without replacement, each with probability
       proportional to its softmax: the largest of z + Gumbel noise among the rest. Outside training the largest of z.
    3. Gates (T, K): softmax over the selected, which for K = 2 are the two probabilities made to sum to 1.
    """

    def select(self, logits: Tensor, top_k: int) -> Tensor:
        best_first = super().select(logits, top_k)
        if not self.training or top_k == 1:
            return best_first
        first = best_first[:, :1]
        gumbel = -torch.empty_like(logits).exponential_().log()
        rest = (self.biased(logits) + gumbel).scatter(1, first, -torch.inf)
        return torch.cat([first, rest.topk(top_k - 1, dim=-1).indices], dim=1)
