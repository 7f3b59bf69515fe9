"""Hash layers (Roller et al., arXiv 2106.04426): the expert is a function of the token alone.

Dimensions: T tokens, E experts, K experts per token, V symbols.
"""

from typing import Any, Dict, Optional

import torch
from torch import Tensor

from fairseq_hyperrouter.errors import UserError

from ..router import Place, Router, RoutingContext, register_router
from ..routing import Routing


@register_router("hash")
class HashRouter(Router):
    """A random table, balanced over the symbols of the dictionary; nothing is trained.

    1. The table holds for every symbol a random order of all experts, such that at every place of the order each expert
       stands for V / E symbols (as near as that goes): blocks of E symbols in random order get the rows of a random
       Latin square each.
    2. The experts of a token are the first K of its symbol's order; all gates are 1 / K.

    The logits are minus the place in the order, 0 for the first: constants, so that the order can be read from them as
    from any router's. Entropy and balance metrics made of them say nothing.
    """

    needs_token_ids = True
    ignores_x = True
    own_choice = True

    def __init__(self, embed_dim: int, num_experts: int, *, vocabulary: int, **options: Any) -> None:
        super().__init__(embed_dim, num_experts, **options)
        if vocabulary < 1:
            raise UserError(f"hash router vocabulary {vocabulary}: must be at least 1")
        # the smallest whole numbers that gloo and NCCL send, as the trainer does on a resume
        whole = torch.uint8 if num_experts <= 256 else torch.int32
        self.register_buffer("table", torch.empty(vocabulary, num_experts, dtype=whole))
        self.reset_parameters()

    @classmethod
    def options(cls, config: Any, place: Place) -> Dict[str, Any]:
        return {**super().options(config, place), "vocabulary": place.vocabulary}

    @torch.no_grad()
    def reset_parameters(self, generator: Optional[torch.Generator] = None) -> None:
        vocabulary, num_experts = self.table.shape
        blocks = -(-vocabulary // num_experts)

        def permutations() -> Tensor:  # one of the experts per block
            return torch.rand(blocks, num_experts, generator=generator).argsort(1)

        # Row r, place p of a block's square: names[(r + shift_p) mod E], a Latin square for any names and shifts.
        shifted = torch.arange(num_experts)[None, :, None] + permutations()[:, None, :]
        squares = permutations().gather(1, (shifted % num_experts).flatten(1)).view(-1, num_experts)
        symbols = torch.randperm(vocabulary, generator=generator)
        self.table[symbols.to(self.table.device)] = squares[:vocabulary].to(self.table)

    @property
    def gates_sum_to_1(self) -> bool:
        return True

    def inference_parameters(self) -> int:
        return 0

    def flops(self) -> int:
        return 0

    def logits(self, x: Tensor, context: RoutingContext) -> Tensor:
        order = self.table[context.token_ids].long()
        places = torch.arange(self.num_experts, device=x.device, dtype=x.dtype)
        return torch.empty(order.shape, dtype=x.dtype, device=x.device).scatter_(1, order, -places.expand(order.shape))

    def route(self, x: Tensor, context: RoutingContext) -> Routing:
        expert_index = self.table[context.token_ids, : context.top_k].long()
        gate = x.new_full(expert_index.shape, 1 / context.top_k)
        return Routing(self.logits(x, context), expert_index, gate)
