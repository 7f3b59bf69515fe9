"""How tokens choose experts; knows tensors only."""

from .capacity import limit_capacity
from .fixed import FixedRouter
from .hyper import HyperNetwork, HyperRouter
from .linear import LinearRouter
from .router import ROUTERS, Router, Routing, RoutingContext, register_router
from .schedule import TopKSchedule

__all__ = [
    "FixedRouter",
    "HyperNetwork",
    "HyperRouter",
    "LinearRouter",
    "ROUTERS",
    "Router",
    "Routing",
    "RoutingContext",
    "TopKSchedule",
    "limit_capacity",
    "register_router",
]
