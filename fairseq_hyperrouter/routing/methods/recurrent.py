"""RMoE, the layerwise recurrent router (Qiu et al., arXiv 2408.06793).

Dimensions: T tokens, D model, E experts, S recurrent state.
"""

from typing import Any, Dict, Optional

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fairseq_hyperrouter.errors import UserError

from ..router import Place, Router, RoutingContext, check_positive, register_router
from ..routing import Routing


@register_router("recurrent")
class RecurrentRouter(Router):
    """What the routers of lower layers saw of a token is carried up by a GRU.

    1. u = P x, P (S, D), of each layer its own.
    2. h_l = GRU(u, h_{l-1}), one GRU for all layers, h = 0 below the first MoE layer.
    3. z = h_l W^T + b.

    The gradient reaches lower layers' projections through h.

    Args:
        cell: the GRU to share; by default the router makes its own.
    """

    shares_parameters = True
    takes = {"moe_router_init_std": "init_std", "moe_router_dim": "dim"}

    def __init__(
        self,
        embed_dim: int,
        num_experts: int,
        *,
        dim: int = 128,
        cell: Optional[nn.GRUCell] = None,
        init_std: Optional[float] = None,
        **options: Any,
    ) -> None:
        super().__init__(embed_dim, num_experts, **options)
        check_positive(init_std=init_std)
        if dim < 1:
            raise UserError(f"recurrent router dim {dim}: must be at least 1")
        self.init_std = 0.02 if init_std is None else init_std
        self._owns_cell = cell is None
        self.cell = nn.GRUCell(dim, dim) if cell is None else cell
        self.projection = nn.Parameter(torch.empty(dim, embed_dim))
        self.weight = nn.Parameter(torch.empty(num_experts, dim))
        self.bias = nn.Parameter(torch.empty(num_experts))
        self.reset_parameters()

    @classmethod
    def options(cls, config: Any, place: Place) -> Dict[str, Any]:
        return {**super().options(config, place), "cell": place.lower[0].cell if place.lower else None}

    @torch.no_grad()
    def reset_parameters(self, generator: Optional[torch.Generator] = None) -> None:
        bound = self.cell.hidden_size**-0.5
        for parameter in self.cell.parameters() if self._owns_cell else ():
            parameter.uniform_(-bound, bound, generator=generator)
        bound = self.embed_dim**-0.5
        self.projection.uniform_(-bound, bound, generator=generator)
        self.weight.normal_(0.0, self.init_std, generator=generator)
        self.bias.zero_()

    def inference_parameters(self) -> int:
        return sum(parameter.numel() for parameter in self.parameters())

    def flops(self) -> int:
        matrices = (self.projection, self.cell.weight_ih, self.cell.weight_hh, self.weight)
        return 2 * sum(matrix.numel() for matrix in matrices)

    def _state(self, x: Tensor, context: RoutingContext) -> Tensor:
        u = F.linear(x, self.projection.to(x.dtype))
        before = torch.zeros_like(u) if context.state is None else context.state.to(u.dtype)
        weights = (parameter.to(u.dtype) for parameter in self.cell.parameters())
        return torch._VF.gru_cell(u, before, *weights)

    def logits(self, x: Tensor, context: RoutingContext) -> Tensor:
        return self._of_state(self._state(x, context))

    def _of_state(self, state: Tensor) -> Tensor:
        return F.linear(state, self.weight.to(state.dtype), self.bias.to(state.dtype))

    def route(self, x: Tensor, context: RoutingContext) -> Routing:
        state = self._state(x, context)
        return self.choose(self._of_state(state), context.top_k)._replace(state=state)
