"""The abstract router and what it returns.

Dimensions: T tokens, D model, E experts, K experts per token.
"""

import math
from abc import ABC, abstractmethod
from typing import Any, Callable, Dict, NamedTuple, Optional, Sequence, Type, TypeVar

import torch
from torch import Tensor

from fairseq_hyperrouter.errors import UserError
from fairseq_hyperrouter.inference import InferenceCache

GATE_SOFTMAX = ("selected", "all")


def check_init_std(init_std: Optional[float]) -> None:
    """Raise a UserError when *init_std* is given and not positive."""
    if init_std is not None and not 0 < init_std < math.inf:
        raise UserError(f"router init_std {init_std}: must be greater than 0, and finite")


class RoutingContext(NamedTuple):
    """What a router may know beside the tokens themselves."""

    top_k: int
    """Experts per token, in force for this call."""
    padding_mask: Optional[Tensor] = None
    """(T,) bool, True where the token is padding; None when nothing is."""


class Routing(NamedTuple):
    """Which experts each token goes to, and with what weight."""

    logits: Tensor
    """(T, E) router logits, float32."""
    expert_index: Tensor
    """(T, K) int64, the chosen experts, best first."""
    gate: Tensor
    """(T, K) float32, the weight of each chosen expert's output."""
    token_mask: Optional[Tensor] = None
    """(T,) bool, True where the token counts (is not padding); None when every token counts."""
    kept: Optional[Tensor] = None
    """(T, K) bool, False where the assignment is not carried out: padding, or over the
    expert's capacity; None when every assignment is carried out."""


class Router(InferenceCache, ABC):
    """Choose K of E experts for every token.

    1. z = logits(x), (T, E), in float32 (or wider) whatever the dtype of x.
    2. The experts of a token are the K largest entries of its row of z.
    3. gate = softmax of z over the K selected entries (``gate_softmax="selected"``, so that the gates
       of a token sum to 1) or over all E (``"all"``, as in Switch, arXiv 2101.03961).
       At K = 1 the first is the constant 1 and gives the router no gradient; the second does.

    A subclass gives ``logits`` and ``reset_parameters``; everything else lives here, once.

    Raises:
        UserError (a ValueError): a size that is not positive, or an unknown ``gate_softmax``.
    """

    def __init__(self, embed_dim: int, num_experts: int, *, gate_softmax: str = "selected") -> None:
        super().__init__()
        if embed_dim < 1:
            raise UserError(f"router embed_dim {embed_dim}: must be at least 1")
        if num_experts < 1:
            raise UserError(f"router num_experts {num_experts}: must be at least 1")
        if gate_softmax not in GATE_SOFTMAX:
            raise UserError(f"gate_softmax {gate_softmax!r}: choose from {', '.join(GATE_SOFTMAX)}")
        self.embed_dim = embed_dim
        self.num_experts = num_experts
        self.gate_softmax = gate_softmax

    @classmethod
    def from_config(cls, config: Any, embed_dim: int, lower: Sequence["Router"] = ()) -> "Router":
        """Build the router from the options of a MoEConfig.

        Args:
            lower: the routers of the MoE layers below, to share weights with.
        """
        return cls(embed_dim, config.moe_expert_count, **cls.options(config, lower))

    @classmethod
    def options(cls, config: Any, lower: Sequence["Router"]) -> Dict[str, Any]:
        """The keyword arguments of the constructor that *config* holds; a subclass adds its own."""
        return {"gate_softmax": config.moe_gate_softmax}

    @abstractmethod
    def logits(self, x: Tensor, context: RoutingContext) -> Tensor:
        """(T, D) tokens in float32 or wider -> (T, E) logits."""

    @abstractmethod
    def reset_parameters(self, generator: Optional[torch.Generator] = None) -> None:
        """Draw every weight, trained or frozen, from *generator*."""

    def forward(self, x: Tensor, context: RoutingContext) -> Routing:
        with torch.autocast(x.device.type, enabled=False):
            logits = self.logits(x.to(torch.promote_types(x.dtype, torch.float32)), context)
            selected, expert_index = logits.topk(context.top_k, dim=-1)
            if self.gate_softmax == "selected":
                gate = selected.softmax(dim=-1)
            else:
                gate = logits.softmax(dim=-1).gather(-1, expert_index)
        if context.padding_mask is None:
            return Routing(logits, expert_index, gate)
        token_mask = ~context.padding_mask
        return Routing(logits, expert_index, gate, token_mask, token_mask[:, None].expand_as(gate))

    def extra_repr(self) -> str:
        return f"embed_dim={self.embed_dim}, num_experts={self.num_experts}, gate_softmax={self.gate_softmax}"


ROUTERS: Dict[str, Type[Router]] = {}
RouterClass = TypeVar("RouterClass", bound=Type[Router])


def register_router(name: str) -> Callable[[RouterClass], RouterClass]:
    """Class decorator: make a Router known to ``--moe-router`` under *name*."""

    def register(cls: RouterClass) -> RouterClass:
        if ROUTERS.get(name, cls) is not cls:
            raise ValueError(f"router {name!r} is already registered, as {ROUTERS[name].__name__}")
        ROUTERS[name] = cls
        return cls

    return register
