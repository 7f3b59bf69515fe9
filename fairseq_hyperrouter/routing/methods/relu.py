"""ReMoE (Wang et al., arXiv 2412.14711): gates relu(z), and no top-k in training.

Dimensions: T tokens, E experts, K experts per token wanted on average.
"""

from typing import Any, Optional

import torch
from torch import Tensor

from ..router import RoutingContext, register_router
from ..routing import Routing
from .linear import LinearRouter

START, STEP, MOST_STEPS = 1e-8, 1.2, 200


@register_router("relu")
class ReluRouter(LinearRouter):
    """z = x W^T + b, g = relu(z): continuous, so every expert's gate learns.

    1. In training a token goes to every expert with g_i > 0. Outside, to the K largest of them.
    2. loss = lambda mean_t sum_i f_i g_ti, f_i = (E / K) times the share of tokens that expert i has: an L1 penalty,
       heavier where an expert has more than its share.
    3. After every update lambda is multiplied by 1.2 when tokens went to more than K experts on average, else
       divided by it. Every layer has its own, kept when it had no token. It starts
       at 1e-8 (``--moe-router-loss-wt`` sets another) and is saved as a number of steps.
    """

    learns_from_load = True
    has_loss = True
    takes = {**LinearRouter.takes, "moe_router_loss_wt": "loss_weight"}
    own_choice = True
    can_distill = False  # in training it has as many experts at every K

    def __init__(self, embed_dim: int, num_experts: int, *, loss_weight: float = START, **options: Any) -> None:
        super().__init__(embed_dim, num_experts, **options)
        self.loss_weight = loss_weight
        self.wanted = 0.0
        self.register_buffer("steps", torch.zeros((), dtype=torch.long))

    @torch.no_grad()
    def reset_parameters(self, generator: Optional[torch.Generator] = None) -> None:
        super().reset_parameters(generator)
        self.steps.zero_()

    def route(self, x: Tensor, context: RoutingContext) -> Routing:
        logits = self.logits(x, context)
        top_k = self.num_experts if self.training else context.top_k
        largest, expert_index = logits.topk(top_k, dim=-1)
        gate = largest.relu()
        routing = Routing(logits, expert_index, gate, chosen=gate > 0)
        if not self.training:
            return routing
        self.wanted = float(context.top_k)
        counts = context.counts(logits)
        gates = logits.relu() * counts
        tokens = counts.sum().clamp(min=1)
        share = (gates > 0).to(gates).sum(0) / tokens * (self.num_experts / context.top_k)
        strength = self.loss_weight * STEP ** self.steps.to(gates)
        return routing._replace(loss=strength * (share * gates).sum() / tokens)

    @torch.no_grad()
    def after_update(self, load: Tensor, tokens: Tensor) -> None:
        super().after_update(load, tokens)
        if self.wanted and tokens > 0:
            self.steps += (load.sum() / tokens - self.wanted).sign().long()
            self.steps.clamp_(-MOST_STEPS, MOST_STEPS)
