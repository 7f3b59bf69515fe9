"""Sparse Mixture-of-Experts models for fairseq: HyperRouter (arXiv 2312.07035) and its peers.

Importing the package registers its architectures, criterions and tasks with fairseq; fairseq's commands do
that for ``--user-dir fairseq_hyperrouter``.
"""

import warnings

with warnings.catch_warnings():  # fairscale, which fairseq imports, uses names that torch has since renamed
    warnings.simplefilter("ignore", FutureWarning)
    import fairseq  # noqa: F401

from .command_line import one_line_errors
from .compat import allow_fairseq_checkpoints, numpy_compat
from .config import MoEConfig
from .criterions import MoECrossEntropyCriterion
from .errors import UserError
from .models import HyperRouterLanguageModel
from .moe_layer import MoELayer
from .routing import (
    FixedRouter,
    HyperNetwork,
    HyperRouter,
    LinearRouter,
    Router,
    Routing,
    RoutingContext,
    TopKSchedule,
    register_router,
)
from .running import running_command
from .tasks import HyperRouterTask

__all__ = [
    "FixedRouter",
    "HyperNetwork",
    "HyperRouter",
    "HyperRouterLanguageModel",
    "HyperRouterTask",
    "LinearRouter",
    "MoEConfig",
    "MoECrossEntropyCriterion",
    "MoELayer",
    "Router",
    "Routing",
    "RoutingContext",
    "TopKSchedule",
    "UserError",
    "register_router",
]

allow_fairseq_checkpoints()
numpy_compat()
if running_command():  # not in somebody's own program
    one_line_errors()
