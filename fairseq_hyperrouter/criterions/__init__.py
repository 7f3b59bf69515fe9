"""Task losses with the routers' auxiliary losses and metrics."""

from .moe_cross_entropy import MoECrossEntropyCriterion

__all__ = ["MoECrossEntropyCriterion"]
