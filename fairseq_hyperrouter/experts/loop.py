"""Multiply sorted tokens with one expert after the other: plain autograd, any device and dtype."""

from typing import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from .dispatch import Dispatch, combine
from .weights import ExpertWeights


def expert_loop(
    x: Tensor,
    dispatch: Dispatch,
    gate: Tensor,
    weights: ExpertWeights,
    activation: Callable[[Tensor], Tensor],
    dropout: float,
) -> Tensor:
    """Sum over a token's assignments of gate * W2 dropout(activation(x W1 + b1)) + b2: (T, D) -> (T, D).

    1. Gather x once, in the order of the experts.
    2. Run each expert on its rows. ``unbind`` keeps every expert in the autograd graph, so one that got
       no token has a zero gradient and not none (torch DDP would stop at a missing one).
    3. Add the outputs up at their tokens.
    """
    ends = dispatch.ends.tolist()
    rows_per_expert = [end - start for start, end in zip([0, *ends], ends)]
    gathered = x.index_select(0, dispatch.token[: ends[-1]])
    outputs = []
    for rows, weight1, bias1, weight2, bias2 in zip(gathered.split(rows_per_expert), *(w.unbind() for w in weights)):
        hidden = F.dropout(activation(F.linear(rows, weight1.t(), bias1)), dropout)
        outputs.append(F.linear(hidden, weight2.t(), bias2))
    return combine(torch.cat(outputs), dispatch, gate, x.size(0))
