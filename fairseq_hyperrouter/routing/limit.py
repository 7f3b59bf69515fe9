"""How a token may go to fewer than K experts.

Dimensions: T tokens, E experts, K experts per token at most.
"""

from typing import NamedTuple, Optional

import torch
from torch import Tensor

from .routing import Routing


class Limit(NamedTuple):
    """Which of its K experts a token keeps. Where several limits are given, all hold."""

    threshold: Optional[float] = None
    """Those whose probability, by the softmax over all E, is at least this, and always the most probable."""
    top_p: Optional[float] = None
    """The fewest whose probabilities add up to this: the more the less a router is sure (arXiv 2403.07652)."""
    token_top_k: Optional[Tensor] = None
    """(T,) int64: this many, the first ones of its row."""

    def apply(self, routing: Routing, renormalise: bool) -> Routing:
        """*routing* with the experts that are kept; their gates add up to 1 again when *renormalise*."""
        keep = torch.ones_like(routing.expert_index, dtype=torch.bool)
        if self.token_top_k is not None:
            keep &= torch.arange(keep.size(1), device=keep.device) < self.token_top_k[:, None]
        if self.threshold is not None or self.top_p is not None:
            probability = routing.logits.softmax(dim=-1).gather(1, routing.expert_index).masked_fill(~keep, 0.0)
            # Loss-free balancing selects in another order than that of the probabilities.
            falling, order = probability.sort(dim=1, descending=True, stable=True)
            enough = torch.ones_like(keep)
            if self.threshold is not None:
                enough &= falling >= self.threshold
            if self.top_p is not None:
                enough &= falling.cumsum(1) - falling < self.top_p
            enough[:, 0] = True
            keep &= torch.zeros_like(keep).scatter_(1, order, enough)
        chosen = keep if routing.chosen is None else routing.chosen & keep
        gate = routing.gate * chosen
        if renormalise:
            gate = gate / gate.sum(dim=1, keepdim=True)
        return routing._replace(chosen=chosen, gate=gate)
