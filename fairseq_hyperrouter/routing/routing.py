"""What a router returns.

Dimensions: T tokens, E experts, K experts per token, S recurrent state.
"""

from typing import NamedTuple, Optional

import torch
from torch import Tensor


class Routing(NamedTuple):
    """Which experts each token goes to, and with what weight."""

    logits: Tensor
    """(T, E) router logits, float32."""
    expert_index: Tensor
    """(T, K) int64, the chosen experts, best first."""
    gate: Tensor
    """(T, K) float32, the weight of each chosen expert's output."""
    token_mask: Optional[Tensor] = None
    """(T,) bool, True where the token counts (is not padding); None when every token counts."""
    kept: Optional[Tensor] = None
    """(T, K) bool, False where the assignment is not carried out: padding, not chosen, or over the
    expert's capacity; None when every assignment is carried out."""
    chosen: Optional[Tensor] = None
    """(T, K) bool, where tokens have different numbers of experts: False where the place stands for none."""
    loss: Optional[Tensor] = None
    """The router's own loss, weighted, 0-dim; None when it has none."""
    state: Optional[Tensor] = None
    """(T, S), handed on to the router of the next MoE layer."""

    def chosen_mask(self) -> Tensor:
        """(T, E) bool: which experts each token chose, those over a capacity included; none for padding."""
        chosen = torch.ones_like(self.expert_index, dtype=torch.bool) if self.chosen is None else self.chosen
        chosen = chosen if self.token_mask is None else chosen & self.token_mask[:, None]
        return torch.zeros_like(self.logits, dtype=torch.bool).scatter_(1, self.expert_index, chosen)
