"""Few rows per expert and no gradients, as in generation: C code of ours, on a CPU in float32.

Dimensions: T tokens, D model, F hidden, E experts, K experts per token, N = T K assignments.

An expert's few rows take no longer than reading its weights, and a call of torch no longer than that. ``few_rows.c``
reads each weight once and needs four calls for a layer, whatever E is. setup.py compiles it where there is a compiler;
without one the other backends do the work.
"""

from typing import Optional

import torch
from torch import Tensor

from fairseq_hyperrouter.native import few_rows as native
from fairseq_hyperrouter.native.usable import may_use_addresses

from .activation import with_gradient
from .weights import ExpertWeights, Hidden

MOST_ROWS = 64
"""Of an expert, on average; with more, products that are made for many rows are as fast."""
MOST_WORK = 2**24
"""Multiply-adds. The C code runs on one thread; more work than this is left to all of torch's, if there are several."""


def serves(x: Tensor, expert_index: Tensor, gate: Tensor, weights: ExpertWeights, hidden: Hidden) -> bool:
    """Whether ``expert_few_rows`` can compute this, and is the fastest that can."""
    assignments, weight1 = expert_index.numel(), weights.weight1
    return (
        native is not None
        and may_use_addresses(x, gate, *weights)
        and expert_index.dtype == torch.int64
        and assignments <= MOST_ROWS * len(weight1)
        and (torch.get_num_threads() == 1 or assignments * weight1[0].numel() <= MOST_WORK)
        and not hidden.dropout
        and all(weight.is_contiguous() for weight in weights)
    )


@torch.no_grad()
def expert_few_rows(
    x: Tensor, expert_index: Tensor, gate: Tensor, kept: Optional[Tensor], weights: ExpertWeights, hidden: Hidden
) -> Tensor:
    """Sum over a token's kept assignments of gate * (activation(x W1 + b1) W2 + b2): (T, D) -> (T, D).

    1. Order the assignments by expert: a counting sort.
    2. Multiply: every expert's rows with its first weight.
    3. Activate, multiply with the second weight.
    4. Combine: add each row, times its gate, to its token.

    Args:
        x, expert_index, gate, kept: as ``ExpertBank.forward`` takes them.
    """
    x, expert_index, gate = x.contiguous(), expert_index.contiguous(), gate.contiguous()
    kept = None if kept is None else kept.contiguous()
    (E, D, F), (_, K), N = weights.weight1.shape, expert_index.shape, expert_index.numel()
    weight1, bias1, weight2, bias2 = (weight.data_ptr() for weight in weights)
    order, starts = expert_index.new_empty(N), expert_index.new_empty(E + 1)
    native.order(
        expert_index.data_ptr(), 0 if kept is None else kept.data_ptr(), order.data_ptr(), starts.data_ptr(), N, E
    )
    before, output = x.new_empty(N, F), x.new_empty(N, D)
    native.products(x.data_ptr(), order.data_ptr(), K, starts.data_ptr(), weight1, bias1, before.data_ptr(), E, D, F)
    activated = with_gradient(hidden.activation).apply(before).contiguous()
    native.products(activated.data_ptr(), 0, 1, starts.data_ptr(), weight2, bias2, output.data_ptr(), E, F, D)
    y = torch.zeros_like(x)
    carried_out = N if kept is None else int(starts[-1])
    native.combine(output.data_ptr(), gate.data_ptr(), order.data_ptr(), y.data_ptr(), carried_out, K, D)
    return y
