"""One expert after the other in plain autograd: any device and dtype, differentiable twice, the shortest to read."""

import torch
import torch.nn.functional as F
from torch import Tensor

from .dispatch import Dispatch
from .weights import ExpertWeights, Hidden, sum_dtype


def expert_loop(x: Tensor, dispatch: Dispatch, gate: Tensor, weights: ExpertWeights, hidden: Hidden) -> Tensor:
    """Sum over a token's assignments of gate * (dropout(activation(x W1 + b1)) W2 + b2): (T, D) -> (T, D).

    1. Gather x once, in the order of the experts.
    2. Run each expert on its rows. ``unbind`` keeps every expert in the autograd graph, so one that got
       no token has a zero gradient and not none (torch DDP would stop at a missing one).
    3. Add the outputs up at their tokens.
    """
    ends = dispatch.ends.tolist()
    rows_per_expert = [end - start for start, end in zip([0, *ends], ends)]
    token = dispatch.token[: ends[-1]]
    outputs = []
    rows = x.index_select(0, token).split(rows_per_expert)
    for expert_rows, weight1, bias1, weight2, bias2 in zip(rows, *(weight.unbind() for weight in weights)):
        activated = F.dropout(hidden.activation(torch.addmm(bias1, expert_rows, weight1)), hidden.dropout)
        outputs.append(torch.addmm(bias2, activated, weight2))
    gate_n = gate.reshape(-1)[dispatch.order[: ends[-1]]]
    y = x.new_zeros(x.shape, dtype=sum_dtype(x))
    return y.index_add(0, token, torch.cat(outputs).to(y.dtype) * gate_n[:, None].to(y.dtype)).to(x.dtype)
