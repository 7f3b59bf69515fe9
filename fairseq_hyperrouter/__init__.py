"""Sparse Mixture-of-Experts models for fairseq: HyperRouter (arXiv 2312.07035) and its peers.

Importing the package registers its architectures, criterions and tasks with fairseq; fairseq's commands do
that for ``--user-dir fairseq_hyperrouter``.
"""

import os
import sys

from .compat import allow_fairseq_checkpoints
from .config import MoEConfig
from .criterions import MoECrossEntropyCriterion
from .errors import UserError, one_line_errors
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
_program = sys.modules["__main__"].__spec__
if os.path.basename(sys.argv[0]).startswith("fairseq-") or (_program and _program.parent == "fairseq_cli"):
    one_line_errors()  # in one of fairseq's commands, not in somebody's own program
