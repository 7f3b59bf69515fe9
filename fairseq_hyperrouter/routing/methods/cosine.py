"""X-MoE's cosine router (Chi et al., arXiv 2204.09179).

Dimensions: T tokens, D model, E experts, C projection.
"""

from typing import Any, Optional

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fairseq_hyperrouter.errors import UserError

from ..router import Router, RoutingContext, register_router

INITIAL_TEMPERATURE = 0.07
LEAST_TEMPERATURE = 0.01


@register_router("cosine")
class CosineRouter(Router):
    """Tokens and experts are compared by their angle in a small space, so that hidden states need not collapse.

    1. u = P x, P (C, D).
    2. z_i = cos(u, v_i) / tau, v_i expert i's embedding (C,), tau a trained temperature, at least 0.01, 0.07 at the
       start.

    P starts orthogonal, v from N(0, 1): only its direction counts. The public code leaves the normalisation of u out;
    this is the paper's.
    """

    takes = {"moe_router_dim": "dim"}

    def __init__(self, embed_dim: int, num_experts: int, *, dim: int = 16, **options: Any) -> None:
        super().__init__(embed_dim, num_experts, **options)
        if dim < 1:
            raise UserError(f"cosine router dim {dim}: must be at least 1")
        self.projection = nn.Parameter(torch.empty(dim, embed_dim))
        self.expert_embedding = nn.Parameter(torch.empty(num_experts, dim))
        self.temperature = nn.Parameter(torch.empty(()))
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self, generator: Optional[torch.Generator] = None) -> None:
        nn.init.orthogonal_(self.projection, generator=generator)
        self.expert_embedding.normal_(generator=generator)
        self.temperature.fill_(INITIAL_TEMPERATURE)

    def inference_parameters(self) -> int:
        return self.projection.numel() + self.expert_embedding.numel() + 1

    def flops(self) -> int:
        return 2 * (self.projection.numel() + self.expert_embedding.numel())

    def logits(self, x: Tensor, context: RoutingContext) -> Tensor:
        tokens = F.normalize(F.linear(x, self.projection.to(x.dtype)), dim=-1)
        experts = F.normalize(self.expert_embedding.to(x.dtype), dim=-1)
        return F.linear(tokens, experts) / self.temperature.to(x.dtype).clamp(min=LEAST_TEMPERATURE)
