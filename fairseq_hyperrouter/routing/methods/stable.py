"""StableMoE (Dai et al., arXiv 2204.08396): learn a router, distil it into one that sees words only, freeze that.

Dimensions: T tokens, D model, E experts, V symbols, C word embedding.
"""

from typing import Any, Dict, Optional

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fairseq_hyperrouter.errors import UserError

from ..router import Place, RoutingContext, register_router
from ..routing import Routing
from .linear import LinearRouter


@register_router("stable")
class StableRouter(LinearRouter):
    """Two stages; a token's expert stops changing in the second.

    1. Stage 1, the first ``stage1_updates``: expert = argmax of z = x W^T + b, gate = sigmoid(z of it). Beside it a
       small router d = words[token] experts^T, words (V, C), experts (E, C), learns to predict the choice.
       loss = loss_weight (balance + distillation): balance = sum_i (load_i / mean load - 1) (sum of i's gates) / T,
       distillation = cross entropy of softmax(d) with the choice.
    2. Stage 2: expert = argmax of d, copied into buffers and so frozen; the gate stays sigmoid(z of it). No loss.

    Which stage a model is in, and the frozen copy, are saved with it. With more experts at inference, the largest of
    z or d.
    """

    trains_with = 1
    own_choice = True
    fixed_gates = "sigmoid"
    needs_token_ids = True
    has_loss = True
    takes = {
        **LinearRouter.takes,
        "moe_router_dim": "dim",
        "moe_router_loss_wt": "loss_weight",
        "moe_stage1_updates": "stage1_updates",
    }

    def __init__(
        self,
        embed_dim: int,
        num_experts: int,
        *,
        vocabulary: int,
        stage1_updates: Optional[int],
        dim: int = 50,
        loss_weight: float = 0.3,
        **options: Any,
    ) -> None:
        super().__init__(embed_dim, num_experts, **options)
        if stage1_updates is not None and stage1_updates < 1:
            raise UserError(f"--moe-stage1-updates {stage1_updates}: must be at least 1")
        self.stage1_updates = stage1_updates
        self.loss_weight = loss_weight
        self.words = nn.Parameter(torch.empty(vocabulary, dim))
        self.experts = nn.Parameter(torch.empty(num_experts, dim))
        self.register_buffer("frozen_words", torch.zeros(vocabulary, dim))
        self.register_buffer("frozen_experts", torch.zeros(num_experts, dim))
        self.register_buffer("is_frozen", torch.zeros((), dtype=torch.bool))
        self._knows_frozen = False
        self.reset_parameters()

    @classmethod
    def options(cls, config: Any, place: Place) -> Dict[str, Any]:
        tenth = max(1, config.updates // 10) if config.updates else None
        return {"stage1_updates": tenth, "vocabulary": place.vocabulary, **super().options(config, place)}

    @torch.no_grad()
    def reset_parameters(self, generator: Optional[torch.Generator] = None) -> None:
        super().reset_parameters(generator)
        for stored in (self.words, self.experts):
            stored.normal_(0.0, 0.1, generator=generator).div_(self.lr_scale)
        self.is_frozen.fill_(False)

    def inference_parameters(self) -> int:
        return super().inference_parameters() + self.experts.numel() + self.words.size(1)

    def flops(self) -> int:
        return super().flops() + 2 * self.experts.numel()

    @torch.no_grad()
    def _begin_stage2(self, update: int) -> None:
        """Freeze, once; afterwards nobody looks at ``is_frozen`` on the host again."""
        if self.stage1_updates is None:
            raise UserError("--moe-stage1-updates: is needed without --max-update")
        if update < self.stage1_updates:
            return
        self._knows_frozen = True
        if self.is_frozen:  # by the training that is resumed
            return
        self.frozen_words.copy_(self.words)
        self.frozen_experts.copy_(self.experts)
        self.is_frozen.fill_(True)

    def route(self, x: Tensor, context: RoutingContext) -> Routing:
        logits = self.logits(x, context)
        if self.training and not self._knows_frozen:
            self._begin_stage2(context.update)
        # where, not if: no look at a value on the GPU
        frozen = self._distilled(self.frozen_words, self.frozen_experts, context, x.dtype)
        chosen_by = torch.where(self.is_frozen, frozen, logits.detach())
        expert_index = chosen_by.topk(context.top_k, dim=-1).indices
        gate = self.gates(logits, expert_index)
        loss = self._loss(logits, expert_index, gate, context) if self.training else None
        return Routing(logits, expert_index, gate, loss=loss)

    def _distilled(self, words: Tensor, experts: Tensor, context: RoutingContext, dtype: torch.dtype) -> Tensor:
        """(T, E) logits d of the small router; both of its factors are stored divided by ``lr_scale``."""
        logits = F.linear(words[context.token_ids].to(dtype), experts.to(dtype))
        return logits if self.lr_scale == 1 else logits * self.lr_scale**2

    def _loss(self, logits: Tensor, expert_index: Tensor, gate: Tensor, context: RoutingContext) -> Tensor:
        counts = context.counts(logits)
        choice = torch.zeros_like(logits).scatter(1, expert_index, counts)
        load = choice.sum(0)
        of_experts = (choice * logits.sigmoid()).sum(0) / counts.sum().clamp(min=1)
        balance = ((load / load.mean().clamp(min=1e-9) - 1) * of_experts).sum()
        distilled = self._distilled(self.words, self.experts, context, logits.dtype)
        per_token = F.cross_entropy(distilled, expert_index[:, 0], reduction="none") * counts[:, 0]
        loss = self.loss_weight * (balance + per_token.sum() / counts.sum().clamp(min=1))
        return torch.where(self.is_frozen, 0.0, loss)
