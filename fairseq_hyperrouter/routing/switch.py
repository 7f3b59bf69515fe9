"""Switch Transformer's router (Fedus et al., arXiv 2101.03961)."""

from typing import Any, Dict

from fairseq_hyperrouter.errors import UserError

from .linear import LinearRouter
from .router import Place, register_router


@register_router("switch")
class SwitchRouter(LinearRouter):
    """The linear router whose gates are the probabilities of the softmax over all experts.

    z = x W^T + b, g_i = softmax(z)_i of the chosen expert, so that the router learns at K = 1, the paper's choice.
    Its other parts are options of every router: ``--moe-top-k 1``, ``--moe-capacity-factor``, ``--moe-router-jitter``
    and the balance loss, ``--moe-gate-loss-wt 0.01``.
    """

    def __init__(self, embed_dim: int, num_experts: int, *, gate_softmax: str = "all", **options: Any) -> None:
        if gate_softmax != "all":
            raise UserError(f"gate_softmax {gate_softmax}: switch's gates are a softmax over all experts")
        super().__init__(embed_dim, num_experts, gate_softmax=gate_softmax, **options)

    @classmethod
    def options(cls, config: Any, place: Place) -> Dict[str, Any]:
        return {**super().options(config, place), "gate_softmax": "all"}
