"""The experts of one layer as stacked weights.

Dimensions: T tokens, D model, F hidden, E experts, K experts per token.
"""

import math
from typing import Any, Callable, Dict, Optional, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fairseq_hyperrouter.errors import UserError
from fairseq_hyperrouter.torch_modes import product_dtype

from .activation import check_activation
from .backend import AUTO, check_backend, compute, compute_ordered
from .dispatch import Dispatch, order_by_expert
from .memory import in_huge_pages
from .parallel import ExpertParallel, ScaleGradient, all_gather_experts, gather_experts, over_workers
from .weights import ExpertWeights, Hidden

PRODUCTS_AT_ONCE = 2**22
"""Of weights, in float64: 32 MiB."""


class ExpertBank(nn.Module):
    """E feed-forward experts: FFN_i(x) = W2_i dropout(activation(x W1_i + b1_i)) + b2_i.

    Each expert starts as ``nn.Linear`` does: U(-1/sqrt(n), 1/sqrt(n)), n its number of inputs.

    Args:
        backend: which implementation computes; "auto" chooses by device, dtype and shape.
        parallel: the workers that the experts are divided over; by default every worker holds all of them. A state
            dict always holds all experts: ``gather`` collects them before, loading takes this worker's.

    Raises:
        UserError (a ValueError): a size that is not positive, a backend that does not exist, an activation with
            parameters or one that works in place, experts that cannot be divided evenly over the workers.
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
        parallel: Optional[ExpertParallel] = None,
    ) -> None:
        super().__init__()
        for name, value in (("num_experts", num_experts), ("embed_dim", embed_dim), ("ffn_embed_dim", ffn_embed_dim)):
            if value < 1:
                raise UserError(f"expert bank {name} {value}: must be at least 1")
        if not 0 <= dropout < 1:
            raise UserError(f"expert bank dropout {dropout}: must be at least 0 and below 1")
        check_activation(activation)
        check_backend("backend", backend)
        if parallel is not None and num_experts % parallel.size:
            raise UserError(f"expert bank num_experts {num_experts}: must be a multiple of {parallel.size} workers")
        self.num_experts = num_experts
        self.parallel = parallel
        self.local_experts = range(num_experts) if parallel is None else parallel.experts(num_experts)
        self._gathered: Optional[Dict[str, Optional[Tensor]]] = None
        self.backend = backend
        self.activation = activation
        self.dropout = dropout
        held = len(self.local_experts)
        self.weight1 = nn.Parameter(in_huge_pages(torch.empty(held, embed_dim, ffn_embed_dim)))
        self.bias1 = nn.Parameter(torch.empty(held, ffn_embed_dim))
        self.weight2 = nn.Parameter(in_huge_pages(torch.empty(held, ffn_embed_dim, embed_dim)))
        self.bias2 = nn.Parameter(torch.empty(held, embed_dim))
        if parallel is not None:
            for parameter in self.parameters():
                parameter.expert = True  # fairseq's mark: not the same on all workers
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self, generators: Optional[Sequence[torch.Generator]] = None) -> None:
        """Draw every expert's weights; with *generators*, one per expert, each from its own."""
        for place, expert in enumerate(self.local_experts):
            generator = generators[expert] if generators else None
            for weight, bias in ((self.weight1, self.bias1), (self.weight2, self.bias2)):
                bound = 1 / math.sqrt(weight.size(1))
                weight[place].uniform_(-bound, bound, generator=generator)
                bias[place].uniform_(-bound, bound, generator=generator)

    def forward(self, x: Tensor, expert_index: Tensor, gate: Tensor, kept: Optional[Tensor] = None) -> Tensor:
        """y_t = sum over k of gate_tk FFN_{expert_index_tk}(x_t) over the assignments that are kept.

        Args:
            x: (T, D) tokens. Products are in their dtype whatever the weights' is; under autocast in autocast's.
            expert_index: (T, K) int64 in 0 .. E - 1.
            gate: (T, K) weight of each expert's output.
            kept: (T, K) bool, False for an assignment that is not carried out; None when all are.

        Returns:
            y (T, D); zero for a token none of whose assignments is kept.

        Raises:
            UserError (a ValueError): other shapes, which C code would read as these.
        """
        self._check_shapes(x, expert_index, gate, kept)
        weights = ExpertWeights(self.weight1, self.bias1, self.weight2, self.bias2)
        if self.parallel is not None:
            # Data parallelism averages gradients over the workers; those of these experts already are of all tokens.
            share = 1 / self.parallel.workers
            weights = ExpertWeights(*(ScaleGradient.apply(weight, share) for weight in weights))
        # A backend's own autograd function would get what autocast makes of each product; give it all of one dtype.
        dtype = product_dtype(x)
        if dtype == x.dtype == self.weight1.dtype:
            return self._compute(x, expert_index, gate, kept, weights)
        with torch.autocast(x.device.type, enabled=False):
            weights = ExpertWeights(*(weight.to(dtype) for weight in weights))
            return self._compute(x.to(dtype), expert_index, gate, kept, weights)

    def _check_shapes(self, x: Tensor, expert_index: Tensor, gate: Tensor, kept: Optional[Tensor]) -> None:
        T, D, shape = len(x), self.weight1.size(1), expert_index.shape
        if x.shape != (T, D):
            raise UserError(f"expert bank x {tuple(x.shape)}: must be (T, {D})")
        if len(shape) != 2 or len(expert_index) != T or gate.shape != shape:
            found = f"expert_index {tuple(shape)}, gate {tuple(gate.shape)}"
            raise UserError(f"expert bank {found}: must both be ({T}, K)")
        if kept is not None and (kept.shape != shape or kept.dtype != torch.bool):
            raise UserError(f"expert bank kept {tuple(kept.shape)} {kept.dtype}: must be {tuple(shape)} torch.bool")

    def _compute(
        self, x: Tensor, expert_index: Tensor, gate: Tensor, kept: Optional[Tensor], weights: ExpertWeights
    ) -> Tensor:
        hidden = Hidden(self.activation, self.dropout if self.training else 0.0)
        if self.parallel is None:
            return compute(self.backend, x, expert_index, gate, kept, weights, hidden, self.training)

        def compute_here(x: Tensor, dispatch: Dispatch, gate: Tensor) -> Tensor:
            return compute_ordered(self.backend, x, dispatch, gate, weights, hidden)

        return over_workers(x, order_by_expert(expert_index, self.num_experts, kept), gate, self.parallel, compute_here)

    @torch.no_grad()
    def weight_products(self) -> Tensor:
        """(E, E), in float64: inner products of every two experts, both weight matrices of each taken as one vector.

        Where experts are divided over workers all of a group call it together.
        """
        total = torch.zeros(self.num_experts, self.num_experts, dtype=torch.double, device=self.weight1.device)
        for weight in (self.weight1, self.weight2):
            for part in weight.flatten(1).split(max(1, PRODUCTS_AT_ONCE // self.num_experts), dim=1):
                rows = part.double()
                rows = rows if self.parallel is None else all_gather_experts(rows, self.parallel)
                total += rows @ rows.t()
        return total

    def gather(self) -> None:
        """Collect all experts on worker 0, for its next state dict; all workers must call it."""
        self._gathered = {name: gather_experts(weight, self.parallel) for name, weight in self.named_parameters()}

    def _save_to_state_dict(self, destination: Dict[str, Any], prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        if self.parallel is None:
            return
        if self._gathered is None:
            raise RuntimeError("the experts are divided over workers: call gather() on all of them before state_dict()")
        for name, weight in self._gathered.items():
            destination[prefix + name] = weight
        self._gathered = None

    def _load_from_state_dict(self, state_dict: Dict[str, Any], prefix: str, *args: Any) -> None:
        for name, parameter in self.named_parameters():
            whole = state_dict.get(prefix + name)
            if whole is not None and len(whole) == self.num_experts != len(parameter):
                state_dict[prefix + name] = whole[self.local_experts.start : self.local_experts.stop]
        super()._load_from_state_dict(state_dict, prefix, *args)

    def extra_repr(self) -> str:
        held, embed_dim, ffn_embed_dim = self.weight1.shape
        divided = "" if self.parallel is None else f", {held} of them here"
        sizes = f"{embed_dim} -> {ffn_embed_dim} -> {embed_dim}"
        return f"num_experts={self.num_experts}{divided}, {sizes}, dropout={self.dropout}"
