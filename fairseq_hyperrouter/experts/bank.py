"""The experts of one layer as stacked weights.

Dimensions: T tokens, D model, F hidden, E experts, K experts per token.
"""

import math
from typing import Callable, Optional, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fairseq_hyperrouter.errors import UserError
from fairseq_hyperrouter.inference import InferenceCache

from .backend import AUTO, BACKENDS, check_backend, choose
from .dispatch import order_by_expert
from .packed import expert_packed, pack
from .weights import ExpertWeights, Hidden


class ExpertBank(InferenceCache):
    """E feed-forward experts: FFN_i(x) = W2_i dropout(activation(x W1_i + b1_i)) + b2_i.

    Each expert starts as ``nn.Linear`` does: U(-1/sqrt(n), 1/sqrt(n)), n its number of inputs.

    Args:
        backend: which implementation computes; "auto" chooses by device, dtype and shape.

    Raises:
        UserError (a ValueError): a size that is not positive, a backend that does not exist.
    """

    def __init__(
        self,
        num_experts: int,
        embed_dim: int,
        ffn_embed_dim: int,
        *,
        activation: Callable[[Tensor], Tensor] = F.relu,
        dropout: float = 0.0,
        backend: str = AUTO,
    ) -> None:
        super().__init__()
        for name, value in (("num_experts", num_experts), ("embed_dim", embed_dim), ("ffn_embed_dim", ffn_embed_dim)):
            if value < 1:
                raise UserError(f"expert bank {name} {value}: must be at least 1")
        if not 0 <= dropout < 1:
            raise UserError(f"expert bank dropout {dropout}: must be at least 0 and below 1")
        check_backend("backend", backend)
        self.backend = backend
        self.activation = activation
        self.dropout = dropout
        self.weight1 = nn.Parameter(torch.empty(num_experts, embed_dim, ffn_embed_dim))
        self.bias1 = nn.Parameter(torch.empty(num_experts, ffn_embed_dim))
        self.weight2 = nn.Parameter(torch.empty(num_experts, ffn_embed_dim, embed_dim))
        self.bias2 = nn.Parameter(torch.empty(num_experts, embed_dim))
        self.reset_parameters()

    @property
    def num_experts(self) -> int:
        return self.weight1.size(0)

    @torch.no_grad()
    def reset_parameters(self, generators: Optional[Sequence[torch.Generator]] = None) -> None:
        """Draw every expert's weights; with *generators*, one per expert, each from its own."""
        self.forget()
        for expert in range(self.num_experts):
            generator = generators[expert] if generators else None
            for weight, bias in ((self.weight1, self.bias1), (self.weight2, self.bias2)):
                bound = 1 / math.sqrt(weight.size(1))
                weight[expert].uniform_(-bound, bound, generator=generator)
                bias[expert].uniform_(-bound, bound, generator=generator)

    def forward(self, x: Tensor, expert_index: Tensor, gate: Tensor, kept: Optional[Tensor] = None) -> Tensor:
        """y_t = sum over k of gate_tk FFN_{expert_index_tk}(x_t) over the assignments that are kept.

        Args:
            x: (T, D) tokens.
            expert_index: (T, K) int64 in 0 .. E - 1.
            gate: (T, K) weight of each expert's output.
            kept: (T, K) bool, False for an assignment that is not carried out; None when all are.

        Returns:
            y (T, D); zero for a token none of whose assignments is kept.
        """
        weights = ExpertWeights(self.weight1, self.bias1, self.weight2, self.bias2)
        # A backend's own autograd function would get what autocast makes of each product; give it all of one dtype.
        # An empty product tells which one, with autocast and without.
        dtype = torch.mm(x.new_empty(0, 0), x.new_empty(0, 0)).dtype
        if dtype == x.dtype:
            return self._compute(x, expert_index, gate, kept, weights)
        with torch.autocast(x.device.type, enabled=False):
            weights = ExpertWeights(*(weight.to(dtype) for weight in weights))
            return self._compute(x.to(dtype), expert_index, gate, kept, weights)

    def _compute(
        self, x: Tensor, expert_index: Tensor, gate: Tensor, kept: Optional[Tensor], weights: ExpertWeights
    ) -> Tensor:
        dispatch = order_by_expert(expert_index, self.num_experts, kept)
        hidden = Hidden(self.activation, self.dropout if self.training else 0.0)
        backend = choose(self.backend, x, dispatch, weights, self.for_inference)
        if backend == "onednn" and self.for_inference:
            return expert_packed(x, dispatch, gate, self.once(x.dtype, lambda: pack(weights)), hidden)
        return BACKENDS[backend](x, dispatch, gate, weights, hidden)

    def extra_repr(self) -> str:
        num_experts, embed_dim, ffn_embed_dim = self.weight1.shape
        return f"num_experts={num_experts}, {embed_dim} -> {ffn_embed_dim} -> {embed_dim}, dropout={self.dropout}"
