"""Expert choice (Zhou et al., arXiv 2202.09368): experts choose tokens.

Dimensions: T tokens, E experts, K experts per token on average.
"""

import math

from torch import Tensor

from ..router import RoutingContext, register_router
from ..routing import Routing
from .linear import LinearRouter


@register_router("expert-choice")
class ExpertChoiceRouter(LinearRouter):
    """Every expert takes the C = ceil(T K / E) tokens that want it most; a token may get any number of experts, or
    none.

    1. p = softmax(x W^T + b) over the experts, (T, E).
    2. Expert i takes the C largest entries of column i, with these as gates. Padding is not chosen.

    The Routing lists all E experts for every token, and ``chosen`` says who took it. Which tokens an expert takes
    depends on all of them, later ones too: not for causal decoders.
    """

    looks_ahead = True
    own_choice = True

    def route(self, x: Tensor, context: RoutingContext) -> Routing:
        logits = self.logits(x, context)
        probability = logits.softmax(dim=-1)
        padding = context.padding_mask
        wanted = probability if padding is None else probability.masked_fill(padding[:, None], -1)
        tokens = len(x) if padding is None else int((~padding).sum())
        capacity = min(tokens, math.ceil(tokens * context.top_k / self.num_experts))
        taken = logits.new_zeros(logits.shape).scatter_(0, wanted.topk(capacity, dim=0).indices, 1.0).bool()
        best_first = probability.masked_fill(~taken, -1).argsort(dim=-1, descending=True, stable=True)
        return Routing(logits, best_first, probability.gather(1, best_first), chosen=taken.gather(1, best_first))
