"""The backends for CPUs: sorted tokens, one expert's run of rows after the other, the backward pass written out.

Dimensions: T tokens, D model, F hidden, E experts, K experts per token, N = T K assignments, n rows of one run.

Why not plain autograd: an expert's products are small, so what lies around them counts. Here

- the hidden rows are all that is kept; x is gathered again in the backward pass, cheaper than keeping N rows of it;
- the gradient of a gate needs no expert output, since sum_d dy_d (h W2)_d = sum_f (dy W2^T)_f h_f;
- weight gradients are written into their place in the stacked tensor;
- everything else is done in place, on rows that are still in the cache.
"""

from typing import Any, List, Optional, Tuple, Type

import torch
from torch import Tensor

from fairseq_hyperrouter.torch_modes import trains

from .activation import with_gradient
from .derivatives import differentiable_once
from .dispatch import Dispatch
from .memory import in_huge_pages
from .run_products import Rows, RunProducts
from .weights import ExpertWeights, Hidden, sum_dtype


def expert_runs(
    products: Type[RunProducts], x: Tensor, dispatch: Dispatch, gate: Tensor, weights: ExpertWeights, hidden: Hidden
) -> Tensor:
    """Sum over a token's assignments of gate * (dropout(activation(x W1 + b1)) W2 + b2): (T, D) -> (T, D)."""
    return _ExpertRuns.apply(dispatch, products, hidden, trains(x, gate, *weights), x, gate, *weights)


class _ExpertRuns(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        dispatch: Dispatch,
        products: Type[RunProducts],
        hidden: Hidden,
        keep: bool,
        x: Tensor,
        gate: Tensor,
        *weights: Tensor,
    ) -> Tensor:
        x, (weight1, bias1, weight2, bias2) = x.contiguous(), (weight.contiguous() for weight in weights)
        activation = with_gradient(hidden.activation)
        gate_N = gate.reshape(-1)[dispatch.order]
        y = x.new_zeros(x.shape, dtype=sum_dtype(x))
        kept: List[Tensor] = []
        masks: List[Tensor] = []
        for rows, expert in _runs(dispatch):
            token = dispatch.token[rows]
            before = products.rows(Rows(x, token), weight1[expert], bias1[expert])
            activated = activation.apply(before).contiguous()
            if hidden.dropout:
                masks.append(torch.empty_like(before).bernoulli_(1 - hidden.dropout).div_(1 - hidden.dropout))
                activated = activated * masks[-1]
            if keep:
                kept.append(activated if activation.keeps_output else before)
            products.add_rows(y, token, activated, weight2[expert], bias2[expert], gate_N[rows])
        if keep:
            ctx.save_for_backward(x, gate_N, weight1, weight2, bias2, *kept, *masks)
            ctx.dispatch, ctx.products, ctx.activation, ctx.gate_shape = dispatch, products, activation, gate.shape
        return y.to(x.dtype)

    @staticmethod
    @differentiable_once
    def backward(ctx: Any, dy: Tensor) -> Tuple[Optional[Tensor], ...]:
        x, gate_N, weight1, weight2, bias2, *kept = ctx.saved_tensors
        if hasattr(ctx, "maybe_clear_saved_tensors"):  # not in older versions of torch
            ctx.maybe_clear_saved_tensors()  # unless the graph is retained, *kept* has the hidden rows alone now
        runs, products, dy = _runs(ctx.dispatch), ctx.products, dy.contiguous()
        kept, masks = kept[: len(runs)], kept[len(runs) :]
        dx, dgate_N = x.new_zeros(x.shape, dtype=sum_dtype(x)), torch.zeros_like(gate_N)
        dweight1, dweight2 = (in_huge_pages(torch.empty_like(weight)) for weight in (weight1, weight2))
        dbias1, dbias2 = weight1.new_empty(len(weight1), weight1.size(2)), torch.empty_like(bias2)
        # A run's hidden rows are freed after it, so the longest, which needs the most room beside them, comes last.
        for place in sorted(range(len(runs)), key=lambda place: runs[place][0].stop - runs[place][0].start):
            rows, expert = runs[place]
            token, gate = ctx.dispatch.token[rows], gate_N[rows]
            hidden_rows, kept[place] = kept[place], None
            activated = hidden_rows
            if not ctx.activation.keeps_output:
                activated = ctx.activation.apply(activated).contiguous()
                if masks:
                    activated = activated * masks[place]
            doutput = products.used_twice(Rows(dy, token))
            dhidden = products.rows(doutput, weight2[expert], transposed=True)
            products.gates(dhidden, activated, doutput, bias2[expert], gate, dgate_N[rows])
            products.weight(Rows(activated), doutput, gate, dweight2[expert], dbias2[expert])
            if masks:
                dhidden.mul_(masks[place])
            dhidden = ctx.activation.backward(dhidden, hidden_rows).contiguous()
            products.weight(Rows(x, token), Rows(dhidden), None, dweight1[expert], dbias1[expert])
            products.add_rows(dx, token, dhidden, weight1[expert], transposed=True)
        for expert in set(range(len(weight1))).difference(expert for _, expert in runs):
            for gradient in (dweight1, dbias1, dweight2, dbias2):
                gradient[expert].zero_()  # torch DDP would stop at a missing one
        dgate = torch.empty_like(dgate_N)
        dgate[ctx.dispatch.order] = dgate_N
        return (*(None,) * 4, dx.to(x.dtype), dgate.view(ctx.gate_shape), dweight1, dbias1, dweight2, dbias2)


def _runs(dispatch: Dispatch) -> List[Tuple[slice, int]]:
    """The rows of each expert that has any, and its number."""
    ends = dispatch.ends.tolist()
    starts = [0, *ends]
    return [(slice(start, end), expert) for expert, (start, end) in enumerate(zip(starts, ends)) if end > start]
