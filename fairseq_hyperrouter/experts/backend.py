"""Which of the implementations computes the experts: the one seam between them and the rest of the package."""

import logging
from typing import Callable, Dict, Set, Tuple

import torch
from torch import Tensor

from fairseq_hyperrouter.errors import UserError

from .dispatch import Dispatch
from .grouped import expert_blocks, expert_grouped
from .loop import expert_loop
from .run_products import has_onednn, onednn_is_faster
from .runs import expert_onednn, expert_runs
from .weights import ExpertWeights, Hidden

logger = logging.getLogger(__name__)

Backend = Callable[[Tensor, Dispatch, Tensor, ExpertWeights, Hidden], Tensor]
"""(x (T, D), dispatch, gate (T, K), weights, hidden) -> y (T, D)"""

BACKENDS: Dict[str, Backend] = {
    "runs": expert_runs,
    "onednn": expert_onednn,
    "grouped": expert_grouped,
    "blocks": expert_blocks,
    "loop": expert_loop,
}
AUTO = "auto"
ENOUGH, PACKED = 2**22, 2**15
HAS_GROUPED_MM = hasattr(torch.nn.functional, "grouped_mm")


def check_backend(option: str, name: str) -> None:
    """Raise a UserError (a ValueError) when *name* is neither a backend nor "auto"."""
    if name not in (AUTO, *BACKENDS):
        raise UserError(f"{option} {name!r}: choose from {', '.join((AUTO, *BACKENDS))}")
    if name == "grouped" and not HAS_GROUPED_MM:
        raise UserError(f"{option} grouped: needs torch 2.10 or later, for grouped_mm; this is {torch.__version__}")
    if name == "onednn" and not has_onednn():
        raise UserError(f"{option} onednn: this torch ({torch.__version__}) was built without oneDNN")


def choose(name: str, x: Tensor, dispatch: Dispatch, weights: ExpertWeights, for_inference: bool) -> str:
    """*name*; for "auto" that of the backend for such a call: on CPUs the fastest measured (docs/performance.md)."""
    chosen = _fastest(x, dispatch, weights, for_inference) if name == AUTO else name
    _log_once(chosen, x)
    return chosen


def _fastest(x: Tensor, dispatch: Dispatch, weights: ExpertWeights, for_inference: bool) -> str:
    aligned = weights.weight1.size(1) * x.itemsize % 16 == weights.weight1.size(2) * x.itemsize % 16 == 0
    can_group = aligned and HAS_GROUPED_MM and x.dtype in (torch.float32, torch.bfloat16)
    if x.device.type == "cpu":
        return _fastest_on_cpu(x, dispatch, weights.weight1, for_inference, can_group)
    if x.device.type != "cuda":
        return "loop"
    # Elsewhere torch's grouped_mm copies the counts to the host and loops.
    fast = x.dtype == torch.bfloat16 and torch.cuda.get_device_capability(x.device)[0] in (9, 10)
    return "grouped" if fast and can_group else "blocks"


def _fastest_on_cpu(x: Tensor, dispatch: Dispatch, weight1: Tensor, for_inference: bool, can_group: bool) -> str:
    assignments, experts = dispatch.order.numel(), dispatch.ends.numel()
    if x.dtype == torch.float32 and onednn_is_faster():
        # A call of oneDNN costs more than one of torch: it pays from so many multiply-adds per expert on. With packed
        # weights the fewer are enough, the more of the time goes into reading the weights.
        enough = ENOUGH * PACKED / weight1[0].numel() if for_inference else ENOUGH
        if assignments * weight1[0].numel() >= enough * experts:
            return "onednn"
    few = experts // 4 <= assignments < 16 * experts
    return "grouped" if few and can_group and not torch.is_grad_enabled() else "runs"


_logged: Set[Tuple[str, str, torch.dtype]] = set()


def _log_once(name: str, x: Tensor) -> None:
    what = (name, x.device.type, x.dtype)
    if what not in _logged:
        _logged.add(what)
        logger.info(f"experts are computed by the backend {name} ({x.device.type}, {str(x.dtype)[6:]})")
