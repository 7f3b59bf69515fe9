"""Switch Transformer's router (Fedus et al., arXiv 2101.03961).

Dimensions: T tokens, D model, E experts, K experts per token.
"""

from ..router import register_router
from .linear import LinearRouter


@register_router("switch")
class SwitchRouter(LinearRouter):
    """The linear router whose gates are the probabilities of the softmax over all experts.

    z = x W^T + b, (T, E), g_i = softmax(z)_i, (T, K), of the chosen expert, so that the router learns at K = 1, the
    paper's choice. Its other parts are options of every router: ``--moe-top-k 1``, ``--moe-capacity-factor``,
    ``--moe-router-jitter`` and the balance loss, ``--moe-gate-loss-wt 0.01``.
    """

    fixed_gates = "all"
