"""The backends for GPUs, and for many small experts: all in one product, and nothing copied to the host.

Dimensions: T tokens, D model, F hidden, E experts, K experts per token, N = T K assignments.

Sorted rows meet their experts' weights in torch's ``grouped_mm`` where that is fast, and everywhere else in batched
products of blocks of rows (``block_products.py``), or in kernels of ours (``triton_products.py``). Either way the
hidden rows are all that is kept and x is gathered again, as in ``runs``. Outputs are brought back to their tokens by a
gather and a sum over K, not by atomic additions: the same numbers at every run.
"""

from typing import Any, Callable, Optional, Tuple

import torch
from torch import Tensor

from fairseq_hyperrouter.torch_modes import trains

from .activation import with_gradient
from .derivatives import differentiable_once
from .dispatch import Dispatch, places, sum_of_assignments
from .grouped_products import Products
from .weights import ExpertWeights, Hidden, sum_dtype


def expert_grouped(
    products: Callable[[Dispatch], Products],
    x: Tensor,
    dispatch: Dispatch,
    gate: Tensor,
    weights: ExpertWeights,
    hidden: Hidden,
) -> Tensor:
    """Sum over a token's assignments of gate * (dropout(activation(x W1 + b1)) W2 + b2): (T, D) -> (T, D)."""
    return _Grouped.apply(dispatch, products(dispatch), hidden, trains(x, gate, *weights), x, gate, *weights)


class _Grouped(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        dispatch: Dispatch,
        products: Products,
        hidden: Hidden,
        keep: bool,
        x: Tensor,
        gate: Tensor,
        *weights: Tensor,
    ) -> Tensor:
        weight1, bias1, weight2, bias2 = (weight.contiguous() for weight in weights)
        activation = with_gradient(hidden.activation)
        gate_N = gate.reshape(-1).index_select(0, dispatch.order)
        expert = dispatch.expert
        if products.skipped is not None:
            gate_N = gate_N.masked_fill(products.skipped[:, 0], 0)
            expert = expert.clamp(max=products.num_experts - 1)
        before = products.rows(x.index_select(0, dispatch.token), weight1)
        before.add_(bias1.index_select(0, expert))
        activated, mask = activation.apply(before), None
        if hidden.dropout:
            mask = torch.empty_like(before).bernoulli_(1 - hidden.dropout).div_(1 - hidden.dropout)
            activated = activated * mask
        output = products.rows(activated, weight2).add_(bias2.index_select(0, expert))
        place = places(dispatch)
        if keep:
            kept = activated if activation.keeps_output else before
            ctx.save_for_backward(x, gate_N, weight1, weight2, bias2, kept, mask, expert, place)
            ctx.dispatch, ctx.activation, ctx.products, ctx.shape = dispatch, activation, products, gate.shape
        return sum_of_assignments(output.to(sum_dtype(x)) * gate_N[:, None], place, gate.shape).to(x.dtype)

    @staticmethod
    @differentiable_once
    def backward(ctx: Any, dy: Tensor) -> Tuple[Optional[Tensor], ...]:
        x, gate_N, weight1, weight2, bias2, kept, mask, expert, place = ctx.saved_tensors
        products, token, wide = ctx.products, ctx.dispatch.token, sum_dtype(x)
        activated = kept
        if not ctx.activation.keeps_output:
            activated = ctx.activation.apply(kept)
            activated = activated if mask is None else activated * mask
        doutput = dy.index_select(0, token)
        dhidden = products.rows(doutput, weight2.transpose(1, 2))
        dgate_N = torch.linalg.vecdot(dhidden.to(wide), activated.to(wide))
        dgate_N += torch.linalg.vecdot(doutput.to(wide), bias2.index_select(0, expert).to(wide))
        if products.skipped is not None:
            dgate_N.masked_fill_(products.skipped[:, 0], 0)
        doutput.mul_(gate_N[:, None])
        dweight2 = products.weights(activated, doutput)
        dhidden.mul_(gate_N[:, None])
        if mask is not None:
            dhidden.mul_(mask)
        dhidden = ctx.activation.backward(dhidden, kept)
        dweight1 = products.weights(x.index_select(0, token), dhidden)
        dx_N = products.rows(dhidden, weight1.transpose(1, 2))
        return (
            *(None,) * 4,
            sum_of_assignments(dx_N.to(wide), place, ctx.shape).to(x.dtype),
            dgate_N.to(gate_N.dtype).index_select(0, place).view(ctx.shape),
            dweight1,
            products.sums(dhidden),
            dweight2,
            products.sums(doutput),
        )
