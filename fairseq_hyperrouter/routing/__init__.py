"""How tokens choose experts; knows neither experts nor fairseq.

router.py     Router: logits, top-k, gates; what a method gets from it and may override
methods/      one routing method per file
routing.py    Routing, what a router returns
limit.py      fewer experts for a token than K
capacity.py   fewer tokens for an expert than chose it
schedule.py   K as a function of the update
assignment.py as many tokens for every expert
inference.py  what weights come to, kept while there is no training
totals.py     sums over the tokens of a Routing: load, probability
losses.py     balance losses of a Routing
metrics.py    what a Routing says of its router: entropy, margin, load
"""

from .capacity import limit_capacity
from .limit import Limit
from .methods import (
    BaseLayersRouter,
    CompeteRouter,
    CosineRouter,
    ExpertChoiceRouter,
    FixedRouter,
    GShardRouter,
    HashRouter,
    HyperNetwork,
    HyperRouter,
    LinearRouter,
    NoisyTopKRouter,
    RecurrentRouter,
    ReluRouter,
    StableRouter,
    SwitchRouter,
)
from .router import ROUTERS, Place, Router, RoutingContext, register_router
from .routing import Routing
from .schedule import TopKSchedule

__all__ = [
    "BaseLayersRouter",
    "CompeteRouter",
    "CosineRouter",
    "ExpertChoiceRouter",
    "FixedRouter",
    "GShardRouter",
    "HashRouter",
    "HyperNetwork",
    "HyperRouter",
    "Limit",
    "LinearRouter",
    "NoisyTopKRouter",
    "Place",
    "ROUTERS",
    "RecurrentRouter",
    "ReluRouter",
    "Router",
    "Routing",
    "RoutingContext",
    "StableRouter",
    "SwitchRouter",
    "TopKSchedule",
    "limit_capacity",
    "register_router",
]
