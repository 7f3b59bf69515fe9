"""Which of the implementations computes the experts: the one seam between them and the rest of the package."""

import logging
import os
from functools import partial
from importlib import metadata
from typing import Callable, Dict, Optional, Set, Tuple

import torch
from torch import Tensor

from fairseq_hyperrouter.errors import UserError
from fairseq_hyperrouter.native.usable import has_native

from .block_products import BlockProducts
from .dispatch import Dispatch, order_by_expert
from .few_rows import expert_few_rows, serves
from .grouped import expert_grouped
from .grouped_products import GroupedProducts, Products
from .loop import expert_loop
from .native_products import NativeRunProducts
from .run_products import RunProducts
from .runs import expert_runs
from .weights import ExpertWeights, Hidden

logger = logging.getLogger(__name__)

Backend = Callable[[Tensor, Dispatch, Tensor, ExpertWeights, Hidden], Tensor]
"""(x (T, D), dispatch, gate (T, K), weights, hidden) -> y (T, D)"""


def _triton_products(dispatch: Dispatch) -> Products:
    from .triton_products import TritonProducts  # takes time, and Triton is not everywhere

    return TritonProducts(dispatch)


BACKENDS: Dict[str, Backend] = {
    "runs": partial(expert_runs, RunProducts),
    "native": partial(expert_runs, NativeRunProducts),
    "grouped": partial(expert_grouped, GroupedProducts),
    "blocks": partial(expert_grouped, BlockProducts),
    "triton": partial(expert_grouped, _triton_products),
    "loop": expert_loop,
}
AUTO = "auto"
HAS_GROUPED_MM = hasattr(torch.nn.functional, "grouped_mm")
HAS_TRITON = any(
    int(package.version.split(".")[0]) >= 3
    for name in ("triton", "pytorch-triton", "pytorch-triton-rocm")  # of releases, nightly builds, AMD's GPUs
    for package in metadata.distributions(name=name)
)

# Where a CPU computes experts together with grouped_mm, and not one after the other:
MANY_EXPERTS = 16  # so many or more have rows
ROWS_TOGETHER = 16  # at most, on average
SMALL_EXPERT = 2**13  # numbers of a weight, at most
WORK_TOGETHER = 2**16  # multiply-adds of a product, at most


def check_backend(option: str, name: str) -> None:
    """Raise a UserError (a ValueError) when *name* is neither a backend nor "auto"."""
    if name not in (AUTO, *BACKENDS):
        raise UserError(f"{option} {name!r}: choose from {', '.join((AUTO, *BACKENDS))}")
    if name == "grouped" and not HAS_GROUPED_MM:
        raise UserError(f"{option} grouped: needs torch 2.10 or later, for grouped_mm; this is {torch.__version__}")
    if name == "triton" and not HAS_TRITON:
        raise UserError(f"{option} triton: needs the package triton, version 3, which comes with PyTorch for GPUs")
    if name == "native" and not has_native():
        raise UserError(f"{option} native: needs a processor with AVX-512, and a C compiler when this was installed")


def check_device(name: str, device: str) -> None:
    """Raise a UserError when the backend *name* cannot compute on a *device*, as in "cpu"."""
    if name == "triton" and device != "cuda" and os.environ.get("TRITON_INTERPRET") != "1":
        raise UserError(f"--moe-backend triton: needs a GPU, and computes on a {device} here; choose auto")


def compute(
    name: str,
    x: Tensor,
    expert_index: Tensor,
    gate: Tensor,
    kept: Optional[Tensor],
    weights: ExpertWeights,
    hidden: Hidden,
    training: bool,
) -> Tensor:
    """Sum over a token's kept assignments of gate * FFN(x), (T, D) -> (T, D), as ``ExpertBank.forward`` takes them.

    Args:
        name: the backend; for "auto" the fastest measured (docs/performance.md).
        training: activations may be computed again with gradients, by another backend than few_rows, and must be the
            same.
    """
    if name == AUTO and not training and serves(x, expert_index, gate, weights, hidden):
        _log_once("few_rows", x)
        return expert_few_rows(x, expert_index, gate, kept, weights, hidden)
    return compute_ordered(name, x, order_by_expert(expert_index, len(weights.weight1), kept), gate, weights, hidden)


def compute_ordered(
    name: str, x: Tensor, dispatch: Dispatch, gate: Tensor, weights: ExpertWeights, hidden: Hidden
) -> Tensor:
    """The same where the assignments have been ordered by expert."""
    chosen = _fastest(x, dispatch, weights) if name == AUTO else name
    if chosen == "native" and any(tensor.dtype != torch.float32 for tensor in (x, gate, *weights)):
        chosen = "runs"  # what it is but for float32
    _check_inputs(chosen, x, weights)
    _log_once(chosen, x)
    return BACKENDS[chosen](x, dispatch, gate, weights, hidden)


def _fastest(x: Tensor, dispatch: Dispatch, weights: ExpertWeights) -> str:
    can_group = HAS_GROUPED_MM and _groups(x, weights)
    if x.device.type == "cpu":
        if can_group and x.dtype == torch.float32 and _has_little_to_do(dispatch, weights):
            return "grouped"
        return "native" if has_native() else "runs"
    if x.device.type != "cuda":
        return "loop"
    # Elsewhere torch's grouped_mm copies the counts to the host and loops.
    fast = x.dtype == torch.bfloat16 and torch.cuda.get_device_capability(x.device)[0] in (9, 10)
    return "grouped" if fast and can_group else "blocks"


def _has_little_to_do(dispatch: Dispatch, weights: ExpertWeights) -> bool:
    """Whether calls of torch for one expert after the other would take longer than their products."""
    _, D, F = weights.weight1.shape
    if D * F > SMALL_EXPERT or dispatch.order.numel() > ROWS_TOGETHER * len(weights.weight1):
        return False
    used = len(set(dispatch.ends.tolist()) - {0})  # experts that have rows
    rows = dispatch.order.numel() / max(used, 1)
    return used >= MANY_EXPERTS and rows <= ROWS_TOGETHER and rows * D * F <= WORK_TOGETHER


def _check_inputs(name: str, x: Tensor, weights: ExpertWeights) -> None:
    if name == "grouped" and x.dtype == torch.float64:
        raise UserError("--moe-backend grouped: torch's grouped_mm has no float64; choose auto")
    if name == "grouped" and not _groups(x, weights):
        sizes = " and ".join(map(str, weights.weight1.shape[1:]))
        raise UserError(f"--moe-backend grouped: experts of width {sizes}, must be multiples of {16 // x.itemsize}")
    check_device(name, x.device.type)
    if name == "triton" and x.dtype == torch.float64:
        raise UserError("--moe-backend triton: adds up in float32, and gets float64; choose blocks")


def _groups(x: Tensor, weights: ExpertWeights) -> bool:
    """Whether rows lie as ``grouped_mm`` wants them."""
    return all(size * x.itemsize % 16 == 0 for size in weights.weight1.shape[1:])


_logged: Set[Tuple[str, str, torch.dtype]] = set()


def _log_once(name: str, x: Tensor) -> None:
    """Say which backend computes, the first time that it does on this device in this dtype."""
    what = (name, x.device.type, x.dtype)
    if what not in _logged:
        _logged.add(what)
        logger.info(f"experts are computed by the backend {name} ({x.device.type}, {str(x.dtype)[6:]})")
