"""The abstract router and what it is told.

Dimensions: T tokens, D model, E experts, K experts per token.
"""

import math
from abc import ABC, abstractmethod
from typing import Any, Callable, Dict, Mapping, NamedTuple, Optional, Sequence, Type, TypeVar

import torch
from torch import Tensor, nn

from fairseq_hyperrouter.errors import UserError

from .limit import Limit
from .routing import Routing

GATE_SOFTMAX = ("selected", "all", "sigmoid")


def check_positive(**arguments: Optional[float]) -> None:
    """Raise a UserError when one of the *arguments* is given and not positive."""
    for name, value in arguments.items():
        if value is not None and not 0 < value < math.inf:
            raise UserError(f"router {name} {value}: must be greater than 0, and finite")


class RoutingContext(NamedTuple):
    """What a router may know beside the tokens themselves."""

    top_k: int
    """Experts per token, in force for this call."""
    padding_mask: Optional[Tensor] = None
    """(T,) bool, True where the token is padding; None when nothing is."""
    token_ids: Optional[Tensor] = None
    """(T,) int64, the tokens' numbers in the dictionary."""
    state: Optional[Tensor] = None
    """(T, S), what the router of the MoE layer below handed on."""
    update: int = 0
    """How many updates the training has made."""
    experts: Optional[Callable[[], Tensor]] = None
    """() -> (T, E, D), what every expert makes of every token."""
    limit: Optional[Limit] = None
    """Which of their K experts tokens keep; None for all."""

    def counts(self, logits: Tensor) -> Tensor:
        """(T, 1) in the dtype of the (T, E) logits: 1 for tokens that count, 0 for padding."""
        if self.padding_mask is None:
            return torch.ones_like(logits[:, :1])
        return (~self.padding_mask[:, None]).to(logits)


class Place(NamedTuple):
    """Where in a model a router stands."""

    embed_dim: int
    """D"""
    index: int = 0
    """Which of the MoE layers, counted from the bottom."""
    count: int = 1
    """How many MoE layers there are."""
    lower: Sequence["Router"] = ()
    """The routers of the MoE layers below, to share weights with."""
    vocabulary: int = 0
    """Symbols in the dictionary."""


class Router(nn.Module, ABC):
    """Choose K of E experts for every token.

    1. In training with a ``jitter`` e: x is multiplied by numbers drawn from U(1 - e, 1 + e) (arXiv 2101.03961).
    2. z = logits(x), (T, E), in float32 (or wider) whatever the dtype of x.
    3. The experts of a token are the K largest entries of its row of z; with a ``loss_free_rate``, of z + bias.
    4. gate = softmax of z over the K selected entries (``gate_softmax="selected"``, so that the gates
       of a token sum to 1) or over all E (``"all"``, as in Switch, arXiv 2101.03961), or sigmoid of z (``"sigmoid"``).
       At K = 1 the first is the constant 1 and gives the router no gradient; the others do.
    5. A token keeps those of its K experts that the context's ``limit`` leaves it; padding goes nowhere.
    6. After every update, with a ``loss_free_rate`` (arXiv 2408.15664): bias_i += rate * sign(mean load - load_i), over
       the tokens of all workers; the mean over the experts is taken off.

    A subclass gives ``logits`` and ``reset_parameters``, and overrides of the other steps only what is its own.

    Class attributes say what a method cannot do without:

    - ``trains_with``: the only K it can be trained with; ``learns_from_load``: ``after_update``;
    - ``needs_token_ids``, and ``ignores_x``, when these are all that it looks at;
    - ``has_loss``: of its own, in its Routings, which the criterion must add;
    - ``shares_parameters``: with the routers of other layers;
    - ``looks_ahead``: the choice for a token depends on later ones, so not in a causal decoder;

    and what it makes of options:

    - ``own_choice``: experts and gates are not those of steps 3 and 4, so that loss-free balancing, ``gate_softmax``
      and thresholds have no say;
    - ``fixed_gates``: the only ``gate_softmax`` it has;
    - ``elastic_lr_scale``: the ``--moe-router-lr-scale`` that an elastic schedule has by default;
    - ``can_distill``: a smaller K can learn from a larger one in training (``--moe-distill-wt``);
    - ``takes``: the options that only some routers have and this one reads, with the argument of its constructor that
      each is passed as when it is given (or that ``options`` makes of it what the constructor takes).

    Raises:
        UserError (a ValueError): a size that is not positive, an unknown ``gate_softmax``, a negative rate or jitter.
    """

    trains_with: Optional[int] = None
    needs_token_ids = False
    ignores_x = False
    shares_parameters = False
    looks_ahead = False
    learns_from_load = False
    has_loss = False
    own_choice = False
    can_distill = True
    fixed_gates: Optional[str] = None
    elastic_lr_scale = 1.0
    takes: Mapping[str, str] = {}

    def __init__(
        self,
        embed_dim: int,
        num_experts: int,
        *,
        gate_softmax: Optional[str] = None,
        jitter: float = 0.0,
        loss_free_rate: float = 0.0,
    ) -> None:
        super().__init__()
        if embed_dim < 1:
            raise UserError(f"router embed_dim {embed_dim}: must be at least 1")
        if num_experts < 1:
            raise UserError(f"router num_experts {num_experts}: must be at least 1")
        only = self.fixed_gates or (GATE_SOFTMAX[0] if self.own_choice else None)
        allowed = GATE_SOFTMAX if only is None else (only,)
        gate_softmax = allowed[0] if gate_softmax is None else gate_softmax
        if gate_softmax not in allowed:
            raise UserError(f"gate_softmax {gate_softmax!r}: choose from {', '.join(allowed)}")
        if not 0 <= jitter < 1:
            raise UserError(f"router jitter {jitter}: must be at least 0 and below 1")
        if jitter and self.ignores_x:
            raise UserError(f"router jitter {jitter}: means nothing to {type(self).__name__}")
        if not 0 <= loss_free_rate < math.inf:
            raise UserError(f"router loss_free_rate {loss_free_rate}: must be at least 0, and finite")
        self.embed_dim = embed_dim
        self.num_experts = num_experts
        self.gate_softmax = gate_softmax
        self.jitter = jitter
        self.loss_free_rate = loss_free_rate
        if loss_free_rate:
            if self.own_choice:
                raise UserError(f"loss_free_rate {loss_free_rate}: {type(self).__name__} selects in its own way")
            self.learns_from_load = True
            # whole numbers: a half precision model would lose steps of 0.001
            self.register_buffer("balancing_steps", torch.zeros(num_experts, dtype=torch.long))

    @classmethod
    def from_config(cls, config: Any, place: Place) -> "Router":
        """Build the router from the options of a MoEConfig."""
        return cls(place.embed_dim, config.moe_expert_count, **cls.options(config, place))

    @classmethod
    def options(cls, config: Any, place: Place) -> Dict[str, Any]:
        """The keyword arguments of the constructor; a subclass adds what is not in ``takes``."""
        own = {argument: getattr(config, name) for name, argument in cls.takes.items()}
        if "moe_router_lr_scale" in cls.takes:
            own[cls.takes["moe_router_lr_scale"]] = config.router_lr_scale  # whose default depends on the schedule
        return {
            **{argument: value for argument, value in own.items() if value is not None},
            "gate_softmax": cls.fixed_gates or config.moe_gate_softmax,
            "jitter": config.moe_router_jitter,
            "loss_free_rate": config.moe_loss_free_rate,
        }

    def inference_parameters(self) -> int:
        """How many numbers one token's routing reads at inference: W and b, unless a method says otherwise."""
        return self.num_experts * (self.embed_dim + 1)

    def flops(self) -> int:
        """Floating point operations of one token's routing at inference, two per multiply-add of a matrix product."""
        return 2 * self.num_experts * self.embed_dim

    @abstractmethod
    def logits(self, x: Tensor, context: RoutingContext) -> Tensor:
        """(T, D) tokens in float32 or wider -> (T, E) logits."""

    @abstractmethod
    def reset_parameters(self, generator: Optional[torch.Generator] = None) -> None:
        """Draw every weight, trained or frozen, from *generator*."""

    def forward(self, x: Tensor, context: RoutingContext) -> Routing:
        """Route the (T, D) tokens."""
        with torch.autocast(x.device.type, enabled=False):
            x = x.to(torch.promote_types(x.dtype, torch.float32))
            if self.jitter and self.training:
                x = x * torch.empty_like(x).uniform_(1 - self.jitter, 1 + self.jitter)
            routing = self.route(x, context)
            if context.limit is not None:
                routing = context.limit.apply(routing, renormalise=self.gates_sum_to_1)
            return _without_padding(routing, context.padding_mask)

    def route(self, x: Tensor, context: RoutingContext) -> Routing:
        """Steps 2 to 4, in float32 or wider; who calls takes padding out."""
        return self.choose(self.logits(x, context), context.top_k)

    def choose(self, logits: Tensor, top_k: int) -> Routing:
        """Steps 3 and 4."""
        expert_index = self.select(logits, top_k)
        return Routing(logits, expert_index, self.gates(logits, expert_index))

    @property
    def gates_sum_to_1(self) -> bool:
        """Whether the gates of every token do, whatever K."""
        return not self.own_choice and self.gate_softmax == "selected"

    def biased(self, logits: Tensor) -> Tensor:
        """The logits with loss-free balancing's bias, which count for the selection."""
        return logits + self.balancing_bias(logits.dtype) if self.loss_free_rate else logits

    def select(self, logits: Tensor, top_k: int) -> Tensor:
        """(T, E) logits -> (T, K) experts, best first."""
        return self.biased(logits).topk(top_k, dim=-1).indices

    def gates(self, logits: Tensor, expert_index: Tensor) -> Tensor:
        """The (T, K) gates of the selected experts."""
        if self.gate_softmax == "all":
            return logits.softmax(dim=-1).gather(-1, expert_index)
        selected = logits.gather(-1, expert_index)
        return selected.softmax(dim=-1) if self.gate_softmax == "selected" else selected.sigmoid()

    @torch.no_grad()
    def after_update(self, load: Tensor, tokens: Tensor) -> None:
        """Called after every update when the router ``learns_from_load``.

        Args:
            load: (E,) assignments to each expert in this update, over all workers.
            tokens: 0-dim, how many tokens there were.
        """
        if self.loss_free_rate:
            self.balancing_steps += (load.mean() - load).sign().long()

    def balancing_bias(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """(E,) what loss-free balancing adds to the logits for the selection; its mean is 0."""
        steps = self.balancing_steps.to(dtype)
        return self.loss_free_rate * (steps - steps.mean())

    def extra_repr(self) -> str:
        return f"embed_dim={self.embed_dim}, num_experts={self.num_experts}, gate_softmax={self.gate_softmax}"


def _without_padding(routing: Routing, padding_mask: Optional[Tensor]) -> Routing:
    if padding_mask is None:
        return routing._replace(kept=routing.chosen)
    token_mask = ~padding_mask
    kept = token_mask[:, None].expand_as(routing.gate)
    return routing._replace(token_mask=token_mask, kept=kept if routing.chosen is None else routing.chosen & kept)


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
