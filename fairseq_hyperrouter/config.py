"""The Mixture-of-Experts options of a model; task and criterion have a few of their own beside their code."""

import math
from dataclasses import dataclass, field
from typing import Any, FrozenSet, Optional, Sequence, Tuple, Union

from fairseq.dataclass import FairseqDataclass
from omegaconf import II

from .errors import UserError, option_name
from .experts.backend import AUTO, check_backend
from .routing import ROUTERS, TopKSchedule
from .routing.router import GATE_SOFTMAX

NO_LAYERS = "none"
ELASTIC_DISTILL_WEIGHT = 1.0
TopK = Union[int, Sequence[int]]
"""Experts per token in all MoE layers, or in each."""


def parse_ints(option: str, value: str) -> Tuple[int, ...]:
    """The integers of a comma separated list; a UserError names the *option* when there are none."""
    try:
        return tuple(int(item) for item in str(value).split(","))
    except ValueError:
        raise UserError(f"{option} {value!r}: must be integers separated by commas, as in 1,2,4") from None


def format_ints(values: TopK) -> str:
    """As parse_ints takes them: 8 -> "8", (1, 4) -> "1,4"."""
    return ",".join(map(str, [values] if isinstance(values, int) else values))


def parse_top_k(option: str, value: object, num_experts: int) -> int:
    """*value* as a number of experts per token; a UserError names the *option* when it is none."""
    if str(value).strip().isdecimal() and 1 <= int(str(value)) <= num_experts:
        return int(str(value))
    raise UserError(f"{option} {value}: must be an integer between 1 and the number of experts ({num_experts})")


def top_k_per_layer(option: str, top_k: TopK, num_experts: int, num_layers: int) -> Tuple[int, ...]:
    """Experts per token in each of *num_layers* MoE layers; a UserError names the *option* when they cannot be."""
    numbers = (top_k,) if isinstance(top_k, int) else tuple(top_k)
    for number in numbers:
        parse_top_k(option, number, num_experts)
    if len(numbers) not in (1, num_layers):
        raise UserError(
            f"{option} {format_ints(numbers)}: must be one number, or one for each of the {num_layers} MoE layers"
        )
    return numbers * num_layers if len(numbers) == 1 else numbers


def distill_weight(criterion: Any, model: Any) -> float:
    """The weight in force: that of the criterion's options, or else the default that the model's make."""
    given = getattr(criterion, "moe_distill_wt", 0.0)  # another criterion has none
    return default_distill_weight(model) if given is None else given


def default_distill_weight(model: Any) -> float:
    """Where the criterion's options give none."""
    elastic = getattr(model, "moe_top_k_schedule", "constant") == "elastic"  # a dense model has none
    return ELASTIC_DISTILL_WEIGHT if elastic and getattr(ROUTERS.get(model.moe_router), "can_distill", False) else 0.0


@dataclass
class MoEConfig(FairseqDataclass):
    """The MoE options of a model. ``check`` tells whether they fit together; the properties give them parsed."""

    moe_router: str = field(
        default="hyperrouter",
        metadata={
            "help": "routing method (docs/methods.md): hyperrouter, smoe (trained linear router), smoe-dropout (frozen "
            "linear router), switch, gshard, noisy-top-k, cosine, hash, base, stable, recurrent, compete, relu"
        },
    )
    moe_expert_count: int = field(default=16, metadata={"help": "experts per MoE layer"})
    moe_freq: int = field(
        default=1, metadata={"help": "every N-th layer has a MoE feed-forward: N-1, 2N-1, ... counted from 0"}
    )
    moe_layers: Optional[str] = field(
        default=None,
        metadata={
            "help": "the layers that have a MoE feed-forward, counted from 0, as in 0,1,2,3, or none; "
            "instead of --moe-freq"
        },
    )
    moe_ffn_embed_dim: Optional[int] = field(
        default=None, metadata={"help": "hidden width of each expert (default: --decoder-ffn-embed-dim)"}
    )
    moe_top_k: int = field(
        default=2,
        metadata={"help": "experts per token in training; with a schedule, at its end (elastic: at most)"},
    )
    moe_top_k_schedule: str = field(
        default="constant",
        metadata={
            "help": "how the experts per token change from --moe-top-k-start to --moe-top-k during training: "
            "constant, linear, cosine, exponential, steps (doubling or halving), elastic (drawn at random)"
        },
    )
    moe_top_k_start: Optional[int] = field(
        default=None,
        metadata={
            "help": "experts per token at the first update; above --moe-top-k, it falls (default: 1); elastic: at "
            "most so many at the first update, growing linearly (default: no such bound)"
        },
    )
    moe_top_k_schedule_updates: int = field(
        default=II("optimization.max_update"),
        metadata={"help": "updates until the schedule arrives at --moe-top-k (default: --max-update)"},
    )
    moe_top_k_choices: Optional[str] = field(
        default=None,
        metadata={
            "help": "what elastic draws from, as in 1,2,4,8,16; a number given twice has twice the chance (default: 1, "
            "2, 4, ... and --moe-top-k)"
        },
    )
    moe_elastic_per: str = field(
        default="layer",
        metadata={"help": "elastic draws once per update for all layers (update), for each layer, or for each token"},
    )
    moe_eval_top_k: Optional[str] = field(
        default=None,
        metadata={
            "help": "experts per token at inference, or a list of them for the MoE layers, as in 1,1,4,8 (default: "
            "--moe-top-k)"
        },
    )
    moe_eval_threshold: Optional[float] = field(
        default=None,
        metadata={
            "help": "at inference, of --moe-eval-top-k experts those compute whose probability is at least this, and "
            "the best (default: all of them)"
        },
    )
    moe_eval_top_p: Optional[float] = field(
        default=None,
        metadata={
            "help": "at inference, of --moe-eval-top-k experts the fewest compute whose probabilities add up to this "
            "(default: all of them)"
        },
    )
    moe_gate_softmax: str = field(
        default="selected",
        metadata={
            "help": "the gates are a softmax over the logits of the selected experts (selected) or of all (all), or "
            "the sigmoid of each logit (sigmoid)"
        },
    )
    moe_router_init_std: Optional[float] = field(
        default=None,
        metadata={
            "help": "standard deviation of the router's weights at the start (default: the method's own, "
            "0.02; hyperrouter: what its hypernetwork generates, about 0.072 at width 256)"
        },
    )
    moe_router_lr_scale: Optional[float] = field(
        default=None,
        metadata={
            "help": "the router learns at so many times the learning rate (with Adam and its kin): its trained "
            "numbers are stored divided by this (default: 1; hyperrouter with an elastic schedule: 10)"
        },
    )
    moe_router_jitter: float = field(
        default=0.0,
        metadata={"help": "in training a router's input is multiplied by numbers drawn from 1 - jitter to 1 + jitter"},
    )
    moe_router_dim: Optional[int] = field(
        default=None,
        metadata={"help": "width that the router computes with (default: cosine 16, recurrent 128, stable's words 50)"},
    )
    moe_router_loss_wt: Optional[float] = field(
        default=None,
        metadata={
            "help": "weight of the router's own loss (default: noisy-top-k 0.1, stable 0.3, compete 1; "
            "relu starts at 1e-8)"
        },
    )
    moe_loss_free_rate: float = field(
        default=0.0,
        metadata={
            "help": "loss-free balancing: after every update each expert's bias in the selection goes up or down by "
            "this much, 0.001 in the paper (default: off)"
        },
    )
    moe_stage1_updates: Optional[int] = field(
        default=None,
        metadata={"help": "stable: updates before the distilled router is frozen (default: a tenth of --max-update)"},
    )
    moe_compete_rate: float = field(
        default=0.05, metadata={"help": "compete: how often a layer's experts compete, per update"}
    )
    moe_compete_version: str = field(
        default="v2", metadata={"help": "compete: affinity of the second paper (v2) or of the first (v1)"}
    )
    moe_hyper_embed_dim: Optional[int] = field(
        default=None,
        metadata={"help": "hyperrouter: size of the trained router embedding (default: the model's width)"},
    )
    moe_hyper_hidden_dim: int = field(
        default=256, metadata={"help": "hyperrouter: hidden width of the frozen hypernetwork"}
    )
    moe_hyper_shared: bool = field(
        default=False, metadata={"help": "hyperrouter: one hypernetwork for all layers instead of one per layer"}
    )
    moe_capacity_factor: Optional[float] = field(
        default=None,
        metadata={
            "help": "in training an expert takes at most ceil(factor * top-k * tokens / experts) assignments and the "
            "rest are dropped (default: no limit)"
        },
    )
    moe_shared_experts: int = field(
        default=0, metadata={"help": "experts that every token goes to, beside the chosen ones"}
    )
    moe_adapter_dim: int = field(
        default=0,
        metadata={"help": "HyperMoE: width of an adapter made from the experts that were not chosen, 64 in the paper"},
    )
    moe_similarity_wt: float = field(
        default=0.0, metadata={"help": "SimSMoE: weight of the penalty on experts that compute the same"}
    )
    moe_upcycle_from: Optional[str] = field(
        default=None,
        metadata={"help": "start from this dense checkpoint: every expert is a copy of its feed-forward"},
    )
    moe_backend: str = field(
        default=AUTO,
        metadata={
            "help": "what computes the experts: auto (by device, dtype and shape; logged once), runs and native (CPU), "
            "grouped (GPU, bfloat16; CPU, many small experts), blocks (GPU, any dtype), triton (GPU, never by auto), "
            "loop (plain autograd)"
        },
    )
    moe_expert_parallel_size: int = field(
        default=1,
        metadata={
            "help": "divide the experts over this many workers, which exchange tokens (default: every worker has all)"
        },
    )

    # options from other parts of the config
    seed: int = II("common.seed")
    max_update: int = II("optimization.max_update")

    def check(self, num_layers: int) -> None:
        """Raise a UserError (a ValueError) for an option that cannot work in a model of *num_layers* layers."""
        if self.moe_router not in ROUTERS:
            # every architecture here is a decoder, which expert-choice cannot serve
            names = sorted(name for name, router in ROUTERS.items() if not router.looks_ahead)
            raise UserError(
                f"--moe-router {self.moe_router!r}: choose from {', '.join(names)}; your own need their --user-dir"
            )
        if self.moe_gate_softmax not in GATE_SOFTMAX:
            raise UserError(f"--moe-gate-softmax {self.moe_gate_softmax!r}: choose from {', '.join(GATE_SOFTMAX)}")
        check_backend("--moe-backend", self.moe_backend)
        for name in (
            "moe_expert_count",
            "moe_ffn_embed_dim",
            "moe_hyper_embed_dim",
            "moe_hyper_hidden_dim",
            "moe_freq",
            "moe_expert_parallel_size",
            "moe_router_dim",
            "moe_stage1_updates",
        ):
            self._check_least(name, 1)
        self._check_least("moe_shared_experts", 0)
        if _resolved(self.moe_top_k_schedule_updates, 0) < 0:
            raise UserError(f"--moe-top-k-schedule-updates {self.moe_top_k_schedule_updates}: must be at least 0")
        self._check_least("moe_adapter_dim", 0)
        self.check_limit(self.moe_eval_threshold, self.moe_eval_top_p)
        for name in ("moe_router_init_std", "moe_router_lr_scale", "moe_capacity_factor"):
            value = getattr(self, name)
            if value is not None and not 0 < value < math.inf:
                raise UserError(f"{option_name(name)} {value}: must be greater than 0, and finite")
        parse_top_k("--moe-top-k", self.moe_top_k, self.moe_expert_count)
        if self.moe_top_k_start is not None:
            parse_top_k("--moe-top-k-start", self.moe_top_k_start, self.moe_expert_count)
            if self.moe_top_k_schedule == "constant":
                raise UserError(f"--moe-top-k-start {self.moe_top_k_start}: not with a constant schedule")
        if self.moe_top_k_choices is not None and self.moe_top_k_schedule != "elastic":
            raise UserError(f"--moe-top-k-choices {self.moe_top_k_choices}: only with --moe-top-k-schedule elastic")
        if self.moe_elastic_per != "layer" and self.moe_top_k_schedule != "elastic":  # layer is the default
            raise UserError(f"--moe-elastic-per {self.moe_elastic_per}: only with --moe-top-k-schedule elastic")
        if self.moe_expert_count % self.moe_expert_parallel_size:
            raise UserError(
                f"--moe-expert-parallel-size {self.moe_expert_parallel_size}: must divide --moe-expert-count "
                f"({self.moe_expert_count})"
            )
        if self.moe_layers is not None and self.moe_freq != 1:
            raise UserError(f"--moe-freq {self.moe_freq}: not together with --moe-layers {self.moe_layers}")
        self._check_router()
        _ = self.eval_top_k(len(self.layer_numbers(num_layers))), self.schedule  # parsing checks them
        for layer in self.layer_numbers(num_layers):
            if not 0 <= layer < num_layers:
                raise UserError(f"--moe-layers {self.moe_layers}: layers are numbered 0 to {num_layers - 1}")
        if not self.layer_numbers(num_layers) and self.moe_layers != NO_LAYERS:
            raise UserError(f"--moe-freq {self.moe_freq}: leaves no MoE layer in a model of {num_layers} layers")

    def check_limit(self, threshold: Optional[float], top_p: Optional[float], prefix: str = "--moe-eval-") -> None:
        """Raise a UserError when tokens cannot be left fewer experts by these at inference."""
        for option, value in ((f"{prefix}threshold", threshold), (f"{prefix}top-p", top_p)):
            if value is not None and not 0 <= value <= 1:
                raise UserError(f"{option} {value}: must be between 0 and 1")
            if value is not None and not self.has_probabilities:
                raise UserError(f"{option} {value}: {self.moe_router} has no probabilities")

    def _check_router(self) -> None:
        for name in ("moe_router_loss_wt", "moe_loss_free_rate", "moe_similarity_wt"):
            value = getattr(self, name)
            if value is not None and not 0 <= value < math.inf:
                raise UserError(f"{option_name(name)} {value}: must be at least 0, and finite")
        if not 0 <= self.moe_router_jitter < 1:
            raise UserError(f"--moe-router-jitter {self.moe_router_jitter}: must be at least 0 and below 1")
        router = ROUTERS[self.moe_router]
        if self.moe_router_jitter and router.ignores_x:
            raise UserError(f"--moe-router-jitter {self.moe_router_jitter}: means nothing to {self.moe_router}")
        if self.moe_loss_free_rate and router.own_choice:
            raise UserError(f"--moe-loss-free-rate {self.moe_loss_free_rate}: {self.moe_router} selects in its own way")
        fixed = (router.own_choice or router.fixed_gates is not None) and self.moe_gate_softmax != router.fixed_gates
        if fixed and self.moe_gate_softmax != "selected":  # the default
            raise UserError(f"--moe-gate-softmax {self.moe_gate_softmax}: {self.moe_router} has gates of its own")
        for name in sorted({name for other in ROUTERS.values() for name in other.takes} - set(router.takes)):
            if getattr(self, name) != self.__dataclass_fields__[name].default:
                raise UserError(f"{option_name(name)} {getattr(self, name)}: means nothing to {self.moe_router}")
        if self.moe_elastic_per == "token" and not router.can_distill:
            raise UserError(
                f"--moe-elastic-per token: {self.moe_router} has as many experts at every k; give layer or update"
            )
        if self.moe_similarity_wt and self.moe_top_k == 1 and self.moe_top_k_schedule == "constant":
            raise UserError(f"--moe-similarity-wt {self.moe_similarity_wt}: with --moe-top-k 1 experts share no token")
        only = router.trains_with
        if only is not None and (self.moe_top_k != only or self.moe_top_k_schedule != "constant"):
            raise UserError(
                f"--moe-top-k {self.moe_top_k}: {self.moe_router} is trained with {only} expert per token, "
                "and a constant schedule; give --moe-eval-top-k for inference"
            )

    def _check_least(self, name: str, least: int) -> None:
        value = getattr(self, name)
        if value is not None and value < least:
            raise UserError(f"{option_name(name)} {value}: must be at least {least}")

    @property
    def schedule(self) -> TopKSchedule:
        choices = self.moe_top_k_choices
        return TopKSchedule(
            self.moe_top_k_schedule,
            end=self.moe_top_k,
            start=self.moe_top_k_start,
            updates=_resolved(self.moe_top_k_schedule_updates, 0),
            choices=None if choices is None else parse_ints("--moe-top-k-choices", choices),
            per=self.moe_elastic_per,
            seed=self.init_seed,
        )

    @property
    def router_lr_scale(self) -> float:
        if self.moe_router_lr_scale is not None:
            return self.moe_router_lr_scale
        return ROUTERS[self.moe_router].elastic_lr_scale if self.moe_top_k_schedule == "elastic" else 1.0

    def eval_top_k(self, num_layers: int) -> Tuple[int, ...]:
        """Experts per token at inference in each of *num_layers* MoE layers."""
        option = "--moe-eval-top-k"
        value = self.moe_top_k if self.moe_eval_top_k is None else self.moe_eval_top_k
        numbers = [parse_top_k(option, item, self.moe_expert_count) for item in str(value).split(",")]
        return top_k_per_layer(option, numbers, self.moe_expert_count, num_layers)

    @property
    def has_probabilities(self) -> bool:
        """Whether a token can have fewer experts where its router is sure: by threshold or top-p."""
        return not ROUTERS[self.moe_router].own_choice

    @property
    def init_seed(self) -> int:
        return _resolved(self.seed, 1)

    @property
    def updates(self) -> int:
        """How many updates the training makes; 0 when nobody knows."""
        return _resolved(self.max_update, 0)

    def layer_numbers(self, num_layers: int) -> FrozenSet[int]:
        """Which of the layers 0 .. num_layers - 1 have a MoE feed-forward."""
        if self.moe_layers == NO_LAYERS:
            return frozenset()
        if self.moe_layers is not None:
            return frozenset(parse_ints("--moe-layers", self.moe_layers))
        return frozenset(range(self.moe_freq - 1, num_layers, self.moe_freq))


def _resolved(value: object, default: int) -> int:
    """*value*, or *default* outside a full fairseq config, where a reference to another section stays unresolved."""
    return default if isinstance(value, str) and value.startswith("${") else int(value or 0)
