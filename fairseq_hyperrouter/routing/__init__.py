"""How tokens choose experts; knows tensors only."""

from .base_layers import BaseLayersRouter
from .capacity import limit_capacity
from .compete import CompeteRouter
from .cosine import CosineRouter
from .expert_choice import ExpertChoiceRouter
from .fixed import FixedRouter
from .gshard import GShardRouter
from .hash import HashRouter
from .hyper import HyperNetwork, HyperRouter
from .limit import Limit
from .linear import LinearRouter
from .noisy_top_k import NoisyTopKRouter
from .recurrent import RecurrentRouter
from .relu import ReluRouter
from .router import ROUTERS, Place, Router, RoutingContext, register_router
from .routing import Routing
from .schedule import TopKSchedule
from .stable import StableRouter
from .switch import SwitchRouter

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
