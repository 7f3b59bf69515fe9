"""BASE layers' router (Lewis et al., arXiv 2103.16716): balanced by assignment instead of a loss.

Dimensions: T tokens, D model, E experts.
"""

from typing import Optional

import torch
from torch import Tensor

from ..assignment import balanced_assignment
from ..router import RoutingContext, register_router
from ..routing import Routing
from .linear import LinearRouter


@register_router("base")
class BaseLayersRouter(LinearRouter):
    """z = x W^T + b, (T, E), gate sigmoid(z_i), (T, 1). In training every expert gets the same number of tokens; else
    a token goes to the best expert(s).

    The paper assigns over the tokens of all workers; here each worker balances its own micro-batch.
    """

    trains_with = 1
    own_choice = True
    fixed_gates = "sigmoid"

    def route(self, x: Tensor, context: RoutingContext) -> Routing:
        logits = self.logits(x, context)
        if self.training:
            expert_index = _balanced(logits.detach(), context.padding_mask)[:, None]
        else:
            expert_index = self.select(logits, context.top_k)
        return Routing(logits, expert_index, self.gates(logits, expert_index))


def _balanced(logits: Tensor, padding_mask: Optional[Tensor]) -> Tensor:
    if padding_mask is None:
        return balanced_assignment(logits)
    expert = torch.zeros(len(logits), dtype=torch.long, device=logits.device)
    expert[~padding_mask] = balanced_assignment(logits[~padding_mask])
    return expert
