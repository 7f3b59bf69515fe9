"""One routing method per file; importing it makes its name known to ``--moe-router``."""

from .base_layers import BaseLayersRouter
from .compete import CompeteRouter
from .cosine import CosineRouter
from .expert_choice import ExpertChoiceRouter
from .fixed import FixedRouter
from .gshard import GShardRouter
from .hash import HashRouter
from .hyper import HyperNetwork, HyperRouter
from .linear import LinearRouter
from .noisy_top_k import NoisyTopKRouter
from .recurrent import RecurrentRouter
from .relu import ReluRouter
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
    "LinearRouter",
    "NoisyTopKRouter",
    "RecurrentRouter",
    "ReluRouter",
    "StableRouter",
    "SwitchRouter",
]
