"""Noisy top-k gating (Shazeer et al., arXiv 1701.06538).

Dimensions: T tokens, D model, E experts, K experts per token.
"""

from typing import Any, Optional

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..router import RoutingContext, register_router
from ..routing import Routing
from .linear import LinearRouter

LEAST_NOISE = 0.01


@register_router("noisy-top-k")
class NoisyTopKRouter(LinearRouter):
    """The linear router with noise whose size is trained, and two losses that balance.

    1. z = x W^T + b; in training z + N(0, 1) s, s = softplus(x W_noise^T) + 0.01. W_noise starts at 0.
    2. The K largest, gates by softmax.
    3. In training, loss = loss_weight (CV^2(importance) + CV^2(load)), CV^2 = variance / mean^2 over the experts.
       importance_i is the sum over tokens of i's gate; load_i the sum of the probability that i stays among the K
       largest when its own noise is drawn anew: Phi((clean z_i - threshold_i) / s_i), threshold_i the K-th largest
       of the other entries. With K = E every expert is always chosen and the load is left out.
    """

    has_loss = True
    takes = {**LinearRouter.takes, "moe_router_loss_wt": "loss_weight"}

    def __init__(self, embed_dim: int, num_experts: int, *, loss_weight: float = 0.1, **options: Any) -> None:
        super().__init__(embed_dim, num_experts, **options)
        self.loss_weight = loss_weight
        self.noise_weight = nn.Parameter(torch.zeros(num_experts, embed_dim))

    @torch.no_grad()
    def reset_parameters(self, generator: Optional[torch.Generator] = None) -> None:
        super().reset_parameters(generator)
        self.noise_weight.zero_()

    def route(self, x: Tensor, context: RoutingContext) -> Routing:
        if not self.training:
            return super().route(x, context)
        clean = self.logits(x, context)
        size = F.softplus(F.linear(x, self.noise_weight.to(x.dtype)) * self.lr_scale) + LEAST_NOISE
        noisy = clean + torch.randn_like(clean) * size
        routing = self.choose(noisy, context.top_k)
        counts = context.counts(clean)
        importance = torch.zeros_like(noisy).scatter(1, routing.expert_index, routing.gate)
        loss = _squared_variation(importance * counts)
        if context.top_k < self.num_experts:
            loss = loss + _squared_variation(self._stays(clean, noisy, size, context.top_k) * counts)
        return routing._replace(loss=self.loss_weight * loss)

    def _stays(self, clean: Tensor, noisy: Tensor, size: Tensor, top_k: int) -> Tensor:
        return _probability_to_stay(self.biased(clean), self.biased(noisy), size, top_k)


def _probability_to_stay(clean: Tensor, noisy: Tensor, size: Tensor, top_k: int) -> Tensor:
    largest = noisy.topk(top_k + 1, dim=-1).values
    kth, next_one = largest[:, -2:-1], largest[:, -1:]
    # among the K largest: the rest's K-th largest is the (K + 1)-th of all
    threshold = torch.where(noisy > next_one, next_one, kth)
    return torch.special.ndtr((clean - threshold) / size)


def _squared_variation(per_token: Tensor) -> Tensor:
    """CV^2 over the experts of the sums over the tokens."""
    total = per_token.sum(0)
    return total.var(unbiased=False) / (total.mean() ** 2 + 1e-10)
