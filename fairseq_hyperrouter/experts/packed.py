"""oneDNN's products with weights that are laid out for them once: inference on a CPU.

Dimensions: T tokens, D model, E experts, K experts per token, N = T K assignments.

An expert's few rows take no longer than reading its weights, so what counts is how these lie in memory.
"""

from typing import List, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from .activation import with_gradient
from .dispatch import Dispatch
from .run_products import packed_rows, packed_weight
from .weights import ExpertWeights, Hidden, sum_dtype


class PackedWeights(NamedTuple):
    """As ExpertWeights, one tensor per expert, in oneDNN's own layout; a second copy of the weights in memory."""

    weight1: List[Tensor]
    bias1: List[Tensor]
    weight2: List[Tensor]
    bias2: List[Tensor]


def pack(weights: ExpertWeights) -> PackedWeights:
    """Lay the weights out for ``expert_packed``."""
    return PackedWeights(
        [packed_weight(weight) for weight in weights.weight1],
        list(weights.bias1.unbind()),
        [packed_weight(weight) for weight in weights.weight2],
        list(weights.bias2.unbind()),
    )


@torch.no_grad()
def expert_packed(x: Tensor, dispatch: Dispatch, gate: Tensor, weights: PackedWeights, hidden: Hidden) -> Tensor:
    """Sum over a token's assignments of gate * (activation(x W1 + b1) W2 + b2): (T, D) -> (T, D), without gradients."""
    activation, fused = with_gradient(hidden.activation), hidden.activation in (F.relu, torch.relu)
    ends = dispatch.ends.tolist()
    x_N = x.index_select(0, dispatch.token[: ends[-1]])
    outputs = [x.new_empty(0, x.size(1))]
    for start, end, weight1, bias1, weight2, bias2 in zip([0, *ends], ends, *weights):
        if end > start:
            activated = packed_rows(x_N[start:end], weight1, bias1, relu=fused)
            activated = activated if fused else activation.apply(activated)
            outputs.append(packed_rows(activated, weight2, bias2))
    output = torch.cat(outputs).to(sum_dtype(x)).mul_(gate.reshape(-1)[dispatch.order[: ends[-1]], None])
    y = x.new_zeros(x.shape, dtype=output.dtype)
    return y.index_add_(0, dispatch.token[: ends[-1]], output).to(x.dtype)
