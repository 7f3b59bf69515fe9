"""CompeteSMoE (Pham et al., arXiv 2402.02526 and 2505.13380): now and then all experts compete, and the router
learns from it.

Dimensions: T tokens, D model, E experts, K experts per token.
"""

from typing import Any, Dict

import torch
import torch.nn.functional as F
from torch import Tensor

from fairseq_hyperrouter.errors import UserError

from ..router import Place, RoutingContext, register_router
from ..routing import Routing
from .linear import LinearRouter

AT_MOST = 3
"""Layers that compete in one update."""
DIVERSITY = 0.01
VERSIONS = ("v2", "v1")


@register_router("compete")
class CompeteRouter(LinearRouter):
    """The linear router, taught by competitions.

    1. After a warm-up of 5 % of the updates each layer competes in an update with probability ``rate``, at most three
       layers in one update; drawn from seed and update, the same on all workers.
    2. A competition runs every expert on every token: affinity a_i = mean_d softplus(FFN_i(x)_d) (v2), or the norm
       of FFN_i(x) (v1). The K largest are chosen, gates = softmax of their affinities.
       loss = loss_weight mean (softmax(z) - softmax(a))^2, a without gradient, and in v2 0.01 times the mean cosine
       between the outputs of a token's chosen experts.
    3. Otherwise, and always outside training: the K largest of z = x W^T + b.

    Args:
        index, count: which of how many MoE layers this is.
        warm_up: updates without a competition.
        seed: of the draws.
    """

    has_loss = True
    fixed_gates = "selected"  # as a competition's
    takes = {
        **LinearRouter.takes,
        "moe_router_loss_wt": "loss_weight",
        "moe_compete_rate": "rate",
        "moe_compete_version": "version",
    }

    def __init__(
        self,
        embed_dim: int,
        num_experts: int,
        *,
        index: int = 0,
        count: int = 1,
        warm_up: int = 0,
        seed: int = 1,
        rate: float = 0.05,
        version: str = "v2",
        loss_weight: float = 1.0,
        **options: Any,
    ) -> None:
        super().__init__(embed_dim, num_experts, **options)
        if version not in VERSIONS:
            raise UserError(f"--moe-compete-version {version!r}: choose from {', '.join(VERSIONS)}")
        if not 0 <= rate <= 1:
            raise UserError(f"--moe-compete-rate {rate}: must be between 0 and 1")
        self.index, self.count, self.warm_up, self.seed = index, count, warm_up, seed
        self.rate, self.version, self.loss_weight = rate, version, loss_weight

    @classmethod
    def options(cls, config: Any, place: Place) -> Dict[str, Any]:
        drawn = {"index": place.index, "count": place.count, "warm_up": config.updates // 20, "seed": config.init_seed}
        return {**super().options(config, place), **drawn}

    def competes(self, update: int) -> bool:
        """Whether this layer competes in this update."""
        if update < self.warm_up:
            return False
        generator = torch.Generator().manual_seed(self.seed * 1_000_003 + update)
        draws = torch.rand(self.count, generator=generator)
        lower = draws < draws[self.index]
        return bool(draws[self.index] < self.rate) and int(lower.sum()) < AT_MOST

    def route(self, x: Tensor, context: RoutingContext) -> Routing:
        if not (self.training and self.competes(context.update)):
            return super().route(x, context)
        logits = self.logits(x, context)
        outputs = context.experts().to(logits.dtype)  # (T, E, D)
        affinity = F.softplus(outputs).mean(-1) if self.version == "v2" else outputs.norm(dim=-1)
        # Without the bias of loss-free balancing, which is in units of logits.
        expert_index = affinity.topk(context.top_k, dim=-1).indices
        counts = context.counts(logits)[:, 0]
        tokens = counts.sum().clamp(min=1)
        difference = logits.softmax(-1) - affinity.detach().softmax(-1)
        loss = self.loss_weight * (difference.square().mean(-1) * counts).sum() / tokens
        if self.version == "v2" and context.top_k > 1:
            chosen = F.normalize(outputs.gather(1, expert_index[:, :, None].expand(-1, -1, outputs.size(2))), dim=-1)
            pairs = context.top_k * (context.top_k - 1)
            cosines = (chosen.sum(1).square().sum(-1) - context.top_k) / pairs  # mean over ordered pairs
            loss = loss + DIVERSITY * (cosines * counts).sum() / tokens
        return Routing(logits, expert_index, affinity.gather(1, expert_index).softmax(-1), loss=loss)
