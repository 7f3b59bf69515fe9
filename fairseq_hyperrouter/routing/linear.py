"""The trained linear router: z = x W^T + b (Shazeer et al., arXiv 1701.06538, without its noise)."""

from typing import Any, Optional

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .router import Router, RoutingContext, check_init_std, register_router

DEFAULT_INIT_STD = 0.02


@register_router("smoe")
class LinearRouter(Router):
    """SMoE: W (E, D) and b (E,) are trained; both start from N(0, init_std)."""

    takes = {"moe_router_init_std": "init_std"}

    def __init__(
        self,
        embed_dim: int,
        num_experts: int,
        *,
        init_std: Optional[float] = None,
        **options: Any,
    ) -> None:
        super().__init__(embed_dim, num_experts, **options)
        check_init_std(init_std)
        self.init_std = DEFAULT_INIT_STD if init_std is None else init_std
        self._add_weights(torch.empty(num_experts, embed_dim), torch.empty(num_experts))
        LinearRouter.reset_parameters(self)  # not a subclass's: its own parameters are not there yet

    def _add_weights(self, weight: Tensor, bias: Tensor) -> None:
        self.weight = nn.Parameter(weight)
        self.bias = nn.Parameter(bias)

    @torch.no_grad()
    def reset_parameters(self, generator: Optional[torch.Generator] = None) -> None:
        self.weight.normal_(0.0, self.init_std, generator=generator)
        self.bias.normal_(0.0, self.init_std, generator=generator)

    def logits(self, x: Tensor, context: RoutingContext) -> Tensor:
        return F.linear(x, self.weight.to(x.dtype), self.bias.to(x.dtype))
