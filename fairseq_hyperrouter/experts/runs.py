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
import torch.nn.functional as F
from torch import Tensor

from .activation import with_gradient
from .dispatch import Dispatch
from .memory import room_like
from .once import differentiable_once
from .run_products import OneDNNProducts, RunProducts
from .weights import ExpertWeights, Hidden, sum_dtype, trains


def expert_runs(x: Tensor, dispatch: Dispatch, gate: Tensor, weights: ExpertWeights, hidden: Hidden) -> Tensor:
    """Sum over a token's assignments of gate * (dropout(activation(x W1 + b1)) W2 + b2): (T, D) -> (T, D)."""
    return _ExpertRuns.apply(dispatch, RunProducts, hidden, trains(x, gate, *weights), x, gate, *weights)


def expert_onednn(x: Tensor, dispatch: Dispatch, gate: Tensor, weights: ExpertWeights, hidden: Hidden) -> Tensor:
    """The same with oneDNN's products."""
    return _ExpertRuns.apply(dispatch, OneDNNProducts, hidden, trains(x, gate, *weights), x, gate, *weights)


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
        weight1, bias1, weight2, bias2 = weights
        activation = with_gradient(hidden.activation)
        gate_N = gate.reshape(-1)[dispatch.order]
        y = x.new_zeros(x.shape, dtype=sum_dtype(x))
        kept: List[Tensor] = []
        masks: List[Tensor] = []
        for rows, expert in _runs(dispatch):
            n, token = rows.stop - rows.start, _padded(dispatch.token[rows], products, x.dtype)
            before = products.rows(x.index_select(0, token), weight1[expert], bias1[expert])
            activated = activation.apply(before)
            if hidden.dropout:
                masks.append(torch.empty_like(before).bernoulli_(1 - hidden.dropout).div_(1 - hidden.dropout))
                activated = activated * masks[-1]
            if keep:
                kept.append(activated if activation.keeps_output else before)
            output = products.rows(activated, weight2[expert], bias2[expert])[:n]
            y.index_add_(0, token[:n], output.to(y.dtype).mul_(gate_N[rows, None]))
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
        runs, products = _runs(ctx.dispatch), ctx.products
        kept, masks = kept[: len(runs)], kept[len(runs) :]
        dx, dgate_N = x.new_zeros(x.shape, dtype=sum_dtype(x)), torch.zeros_like(gate_N)
        dweight1, dweight2 = room_like(weight1), room_like(weight2)
        dbias1, dbias2 = weight1.new_empty(len(weight1), weight1.size(2)), torch.empty_like(bias2)
        # A run's hidden rows are freed after it, so the longest, which needs the most room beside them, comes last.
        for place in sorted(range(len(runs)), key=lambda place: runs[place][0].stop - runs[place][0].start):
            rows, expert = runs[place]
            n, token = rows.stop - rows.start, _padded(ctx.dispatch.token[rows], products, x.dtype)
            gate = F.pad(gate_N[rows], (0, len(token) - n))[:, None]  # 0: no part in any sum
            hidden_rows, kept[place] = kept[place], None
            activated = hidden_rows
            if not ctx.activation.keeps_output:
                activated = ctx.activation.apply(activated)
                if masks:
                    activated = activated * masks[place]
            doutput = dy.index_select(0, token)
            dhidden = products.rows(doutput, weight2[expert].t())
            dgate_N[rows] = torch.linalg.vecdot(dhidden.to(dx.dtype), activated.to(dx.dtype))[:n]
            dgate_N[rows] += doutput[:n] @ bias2[expert]
            doutput.mul_(gate)
            products.weight(activated, doutput, out=dweight2[expert])
            torch.sum(doutput, 0, out=dbias2[expert])
            dhidden.mul_(gate)
            if masks:
                dhidden.mul_(masks[place])
            dhidden = ctx.activation.backward(dhidden, hidden_rows)
            products.weight(x.index_select(0, token), dhidden, out=dweight1[expert])
            torch.sum(dhidden, 0, out=dbias1[expert])
            dx.index_add_(0, token[:n], products.rows(dhidden, weight1[expert].t())[:n].to(dx.dtype))
        for expert in set(range(len(weight1))).difference(expert for _, expert in runs):
            for gradient in (dweight1, dbias1, dweight2, dbias2):
                gradient[expert].zero_()  # torch DDP would stop at a missing one
        dgate = torch.empty_like(dgate_N)
        dgate[ctx.dispatch.order] = dgate_N
        return (*(None,) * 4, dx.to(x.dtype), dgate.view(ctx.gate_shape), dweight1, dbias1, dweight2, dbias2)


def _padded(token: Tensor, products: Type[RunProducts], dtype: torch.dtype) -> Tensor:
    """The run's tokens, the last of them repeated: a row that the expert computes anyway."""
    padding = products.padding(len(token), dtype)
    return torch.cat((token, token[-1:].expand(padding))) if padding else token


def _runs(dispatch: Dispatch) -> List[Tuple[slice, int]]:
    """The rows of each expert that has any, and its number."""
    ends = dispatch.ends.tolist()
    starts = [0, *ends]
    return [(slice(start, end), expert) for expert, (start, end) in enumerate(zip(starts, ends)) if end > start]
