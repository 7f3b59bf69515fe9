"""The one place where routing meets experts.

Dimensions: T tokens, D model, F hidden, E experts, K experts per token.
"""

import math
from functools import partial
from typing import Callable, List, Optional, Tuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .errors import UserError
from .experts import ExpertBank, ExpertParallel, SharedExperts, UnselectedAdapter, similarity_penalty
from .routing import Limit, Router, Routing, RoutingContext, limit_capacity


class MoELayer(nn.Module):
    """A Sparse Mixture-of-Experts feed-forward layer for any PyTorch program.

    1. Route: the router chooses K of E experts for every token, and their gates.
    2. In training with a ``capacity_factor``: drop the assignments over the experts' capacity. Without
       one, and always in evaluation, nothing is dropped.
    3. Compute: y = sum over the chosen experts of gate * FFN(x); plus the shared experts, ungated
       (DeepSeekMoE, arXiv 2401.06066); plus, with an ``adapter_dim``, what the experts that were not chosen
       suggest (HyperMoE, arXiv 2402.12656).
    4. In training with a ``similarity_weight``: add SimSMoE's penalty on experts that compute the same
       (arXiv 2406.15883) to the loss in the Routing.

    Padding is routed nowhere and gets nothing from the routed experts.

    Args:
        router: who chooses; it knows D and E.
        ffn_embed_dim: F, the hidden width of each expert.
        top_k: K, when ``forward`` is not told another.
        activation: between the two products of an expert.
        activation_dropout: probability of dropping a hidden unit of an expert.
        capacity_factor: an expert takes at most ceil(factor * K * T / E) assignments in training.
        shared_experts: how many experts every token goes to beside the chosen ones.
        backend: what computes the experts, one of BACKENDS in ``experts/backend.py``, or auto.
        parallel: the workers that the experts are divided over; see ``experts/parallel.py``.
        adapter_dim: width of HyperMoE's adapter of the experts that were not chosen; 0 for none.
        similarity_weight: weight of SimSMoE's penalty in the Routing's loss; 0 for none.

    Raises:
        UserError (a ValueError): naming the argument, its value and what is allowed.

    >>> import torch
    >>> layer = MoELayer(HyperRouter(embed_dim=64, num_experts=8), ffn_embed_dim=128, top_k=2)
    >>> y, routing = layer(torch.randn(3, 5, 64))
    >>> y.shape, routing.expert_index.shape
    (torch.Size([3, 5, 64]), torch.Size([15, 2]))
    """

    def __init__(
        self,
        router: Router,
        ffn_embed_dim: int,
        *,
        top_k: int = 2,
        activation: Callable[[Tensor], Tensor] = F.relu,
        activation_dropout: float = 0.0,
        capacity_factor: Optional[float] = None,
        shared_experts: int = 0,
        backend: str = "auto",
        parallel: Optional[ExpertParallel] = None,
        adapter_dim: int = 0,
        similarity_weight: float = 0.0,
    ) -> None:
        super().__init__()
        if capacity_factor is not None and not 0 < capacity_factor < math.inf:
            raise UserError(f"capacity_factor {capacity_factor}: must be greater than 0, and finite")
        if not isinstance(shared_experts, int) or shared_experts < 0:
            raise UserError(f"shared_experts {shared_experts}: must be an integer, at least 0")
        if adapter_dim < 0:
            raise UserError(f"adapter_dim {adapter_dim}: must be at least 0")
        if not 0 <= similarity_weight < math.inf:
            raise UserError(f"similarity_weight {similarity_weight}: must be at least 0, and finite")
        self.router = router
        self.top_k = self._checked(top_k)
        self.capacity_factor = capacity_factor

        sizes = (router.embed_dim, ffn_embed_dim)
        hidden = {"activation": activation, "dropout": activation_dropout}
        self.experts = ExpertBank(router.num_experts, *sizes, **hidden, backend=backend, parallel=parallel)
        self.shared_experts = SharedExperts(shared_experts, *sizes, **hidden) if shared_experts else None
        self.similarity_weight = similarity_weight
        self.adapter = UnselectedAdapter(sizes[0], router.num_experts, adapter_dim) if adapter_dim else None

    def _checked(self, top_k: int) -> int:
        if type(top_k) is not int or not 1 <= top_k <= self.router.num_experts:
            raise UserError(
                f"top_k {top_k}: must be an integer between 1 and the number of experts ({self.router.num_experts})"
            )
        return top_k

    def forward(
        self,
        x: Tensor,
        *,
        top_k: Optional[int] = None,
        padding_mask: Optional[Tensor] = None,
        token_ids: Optional[Tensor] = None,
        router_state: Optional[Tensor] = None,
        update: int = 0,
        limit: Optional[Limit] = None,
    ) -> Tuple[Tensor, Routing]:
        """(..., D) tokens -> y (..., D) and the Routing of the T tokens in the order of x.

        Args:
            top_k: K for this call; default: the layer's.
            padding_mask: bool, the shape of x without D; True where there is no token.
            token_ids: int64, the same shape; for routers that look at the tokens themselves.
            router_state: ``state`` of the Routing of the MoE layer below, for routers that hand one on.
            update: how many updates the training has made, for routers that change with it.
            limit: which of their K experts tokens keep; its tensors are in the order of x's tokens.
        """
        x_TD = x.reshape(-1, x.size(-1))
        mask_T, ids_T = (None if one is None else one.reshape(-1) for one in (padding_mask, token_ids))
        if ids_T is None and self.router.needs_token_ids:
            raise UserError(f"token_ids None: {type(self.router).__name__} needs them")
        top_k = self.top_k if top_k is None else self._checked(top_k)
        context = RoutingContext(top_k, mask_T, ids_T, router_state, update, partial(self.every_expert, x_TD), limit)
        routing = self.router(x_TD, context)
        if self.training and self.capacity_factor is not None:
            routing = limit_capacity(routing, self.capacity_factor)
        y_TD = self.experts(x_TD, routing.expert_index, routing.gate, routing.kept)
        if self.shared_experts is not None:
            y_TD = y_TD + self.shared_experts(x_TD)
        if self.adapter is not None:
            y_TD = y_TD + self.adapter(x_TD, routing.chosen_mask())
        if self.training and self.similarity_weight:
            penalty = similarity_penalty(x_TD, routing.chosen_mask(), self._expert)
            loss = self.similarity_weight * penalty
            routing = routing._replace(loss=loss if routing.loss is None else routing.loss + loss)
        return y_TD.view_as(x), routing

    def _expert(self, x: Tensor, which: int) -> Tensor:
        """(T, D) -> (T, D), what one expert makes of every token."""
        return self.experts(x, torch.full((len(x), 1), which, device=x.device), x.new_ones(len(x), 1))

    def every_expert(self, x: Tensor) -> Tensor:
        """(T, D) -> (T, E, D), what every expert makes of every token."""
        E = self.router.num_experts
        experts = torch.arange(E, device=x.device).repeat(len(x))[:, None]
        rows = x.repeat_interleave(E, dim=0)
        return self.experts(rows, experts, rows.new_ones(len(rows), 1)).view(len(x), E, x.size(-1))

    def extra_repr(self) -> str:
        return f"top_k={self.top_k}, capacity_factor={self.capacity_factor}"


def moe_layers(model: nn.Module) -> List[MoELayer]:
    """Those of a model, from the bottom."""
    return [module for module in model.modules() if isinstance(module, MoELayer)]
