"""The trained linear router: z = x W^T + b (Shazeer et al., arXiv 1701.06538, without its noise)."""

from typing import Any, Optional

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..router import Router, RoutingContext, check_positive, register_router

DEFAULT_INIT_STD = 0.02


@register_router("smoe")
class LinearRouter(Router):
    """SMoE: W (E, D) and b (E,) are trained; both start from N(0, init_std).

    With an ``lr_scale`` s they are stored divided by s, so that a step of Adam moves them s times as far.
    """

    takes = {"moe_router_init_std": "init_std", "moe_router_lr_scale": "lr_scale"}

    def __init__(
        self,
        embed_dim: int,
        num_experts: int,
        *,
        init_std: Optional[float] = None,
        lr_scale: float = 1.0,
        **options: Any,
    ) -> None:
        super().__init__(embed_dim, num_experts, **options)
        check_positive(init_std=init_std, lr_scale=lr_scale)
        self.init_std = DEFAULT_INIT_STD if init_std is None else init_std
        self.lr_scale = lr_scale
        self._add_weights(torch.empty(num_experts, embed_dim), torch.empty(num_experts))
        LinearRouter.reset_parameters(self)  # not a subclass's: its own parameters are not there yet

    def _add_weights(self, weight: Tensor, bias: Tensor) -> None:
        self.weight = nn.Parameter(weight)
        self.bias = nn.Parameter(bias)

    @torch.no_grad()
    def reset_parameters(self, generator: Optional[torch.Generator] = None) -> None:
        for stored in (self.weight, self.bias):
            stored.normal_(0.0, self.init_std, generator=generator).div_(self.lr_scale)

    def logits(self, x: Tensor, context: RoutingContext) -> Tensor:
        logits = F.linear(x, self.weight.to(x.dtype), self.bias.to(x.dtype))
        return logits if self.lr_scale == 1 else logits * self.lr_scale
