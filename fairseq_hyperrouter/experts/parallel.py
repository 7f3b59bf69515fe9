"""Experts divided over workers: rows travel to the worker that holds their expert, and back (arXiv 2006.16668).

Dimensions: T tokens, D model, E experts, K experts per token, P workers, W of them in all, M rows that arrive here.
"""

from typing import Any, Callable, List, Tuple

import torch
import torch.distributed as dist
from torch import Tensor

from .dispatch import Dispatch, order_by_expert, places, sum_of_assignments
from .weights import sum_dtype


class ExpertParallel:
    """Who holds which experts: W workers in W / P groups, in each group every expert once, E / P of them per worker.

    All workers must make it together, after ``torch.distributed`` is initialised; it makes the process groups.

    Attributes:
        size: P.
        rank: this worker's place in its group.
        workers: W.
        group: the process group of the P workers that rows are exchanged with.
        replicas: that of the W / P workers that hold the same experts.

    Raises:
        ValueError: W is not a multiple of P.
    """

    def __init__(self, size: int) -> None:
        self.workers = dist.get_world_size()
        if size < 1 or self.workers % size:
            raise ValueError(f"{self.workers} workers are not a multiple of {size}")
        self.size, self.rank = size, dist.get_rank() % size
        starts = range(0, self.workers, size)
        self.group = _my_group([list(range(start, start + size)) for start in starts])
        self.replicas = _my_group([[start + place for start in starts] for place in range(size)])

    def experts(self, num_experts: int) -> range:
        """Which of E experts this worker holds."""
        count = num_experts // self.size
        return range(self.rank * count, (self.rank + 1) * count)

    def __deepcopy__(self, memo: Any) -> "ExpertParallel":
        return self  # process groups cannot be copied


def _my_group(groups: List[List[int]]) -> Any:
    mine = None
    for ranks in groups:  # every worker has to take part in making every group
        group = dist.new_group(ranks)
        if dist.get_rank() in ranks:
            mine = group
    return mine


def over_workers(
    x: Tensor,
    dispatch: Dispatch,
    gate: Tensor,
    parallel: ExpertParallel,
    compute: Callable[[Tensor, Dispatch, Tensor], Tensor],
) -> Tensor:
    """Let the workers of a group compute each other's tokens; the numbers of tokens may differ, or be 0.

    1. Tell every worker how many rows it gets for each of its experts.
    2. Send each carried-out assignment's row of x and its gate to the worker that holds the expert.
    3. There, order them by expert and compute gate * FFN(x).
    4. Send the results back, and add up those of each token.

    Args:
        x: (T, D); T may be another one on every worker.
        dispatch: the T K assignments, over all E experts.
        gate: (T, K).
        compute: (rows (M, D), their dispatch over this worker's experts, gate (M, 1)) -> (M, D).
    """
    counts = dispatch.ends.diff(prepend=dispatch.ends.new_zeros(1))
    arriving = torch.empty_like(counts)
    dist.all_to_all_single(arriving, counts, group=parallel.group)
    arriving = arriving.view(parallel.size, -1)  # (P, E / P), from each worker for each expert
    send = counts.view(parallel.size, -1).sum(1).tolist()
    receive = arriving.sum(1).tolist()

    carried_out = sum(send)
    token, order = dispatch.token[:carried_out], dispatch.order[:carried_out]
    rows = _Exchange.apply(x.index_select(0, token), send, receive, parallel.group)
    row_gate = _Exchange.apply(gate.reshape(-1, 1).index_select(0, order), send, receive, parallel.group)

    local_experts = torch.arange(arriving.size(1), device=x.device).repeat(parallel.size)
    expert_index = local_experts.repeat_interleave(arriving.flatten())[:, None]
    outputs = compute(rows, order_by_expert(expert_index, arriving.size(1)), row_gate)

    outputs = _Exchange.apply(outputs, receive, send, parallel.group).to(sum_dtype(x))
    outputs = torch.cat([outputs, outputs.new_zeros(dispatch.order.numel() - carried_out, x.size(1))])
    return sum_of_assignments(outputs, places(dispatch), gate.shape).to(x.dtype)


class _Exchange(torch.autograd.Function):
    """all-to-all of rows: send[i] of them to worker i, receive[i] from it; gradients go the way back."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor, send: List[int], receive: List[int], group: Any) -> Tensor:
        ctx.send, ctx.receive, ctx.group = send, receive, group
        return _all_to_all(rows, send, receive, group)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tuple[Tensor, None, None, None]:
        return _all_to_all(gradient, ctx.receive, ctx.send, ctx.group), None, None, None


def _all_to_all(rows: Tensor, send: List[int], receive: List[int], group: Any) -> Tensor:
    received = rows.new_empty(sum(receive), *rows.shape[1:])
    dist.all_to_all_single(received, rows.contiguous(), receive, send, group=group)
    return received


class ScaleGradient(torch.autograd.Function):
    """The identity, whose gradient is multiplied by a constant."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, factor: float) -> Tensor:
        ctx.factor = factor
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tuple[Tensor, None]:
        return gradient * ctx.factor, None


def all_gather_experts(local: Tensor, parallel: ExpertParallel) -> Tensor:
    """Of a tensor of this worker's experts (E / P, ...), that of all E. All workers of a group call it together."""
    parts = [torch.empty_like(local) for _ in range(parallel.size)]
    dist.all_gather(parts, local.contiguous(), group=parallel.group)
    return torch.cat(parts)


def gather_experts(local: Tensor, parallel: ExpertParallel) -> Any:
    """Of a tensor of this worker's experts (E / P, ...), that of all E, in main memory of worker 0, which saves them.

    None on the others. All workers of a group must call it together; those that hold the same once more send nothing.
    """
    if dist.get_rank() >= parallel.size:
        return None
    local = local.detach().contiguous()
    parts = [torch.empty_like(local) for _ in range(parallel.size)] if parallel.rank == 0 else None
    dist.gather(local, parts, dst=0, group=parallel.group)
    return None if parts is None else torch.cat([part.cpu() for part in parts])
