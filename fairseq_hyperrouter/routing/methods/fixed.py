"""The frozen random router of SMoE-Dropout (Chen et al., arXiv 2303.01610).

Dimensions: T tokens, D model, E experts.
"""

from torch import Tensor

from ..router import register_router
from .linear import LinearRouter


@register_router("smoe-dropout")
class FixedRouter(LinearRouter):
    """SMoE-Dropout: z = x W^T + b, (T, E), with W (E, D) and b (E,) drawn from N(0, init_std) and never trained.

    They are buffers: no optimizer, fine-tuning or weight decay can reach them, and they are saved.
    The method grows the experts per token during training: ``--moe-top-k-schedule linear``.
    """

    takes = {"moe_router_init_std": "init_std"}

    def _add_weights(self, weight: Tensor, bias: Tensor) -> None:
        self.register_buffer("weight", weight)
        self.register_buffer("bias", bias)
