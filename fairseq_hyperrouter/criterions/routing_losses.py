"""Auxiliary losses and metrics of a model's Routings, for any criterion.

Dimensions: L MoE layers, E experts.
"""

import math
from dataclasses import dataclass, field
from typing import Any, Dict, List, Optional, Sequence

import torch
import torch.distributed as dist
from fairseq.dataclass import FairseqDataclass
from fairseq.logging import metrics
from torch import Tensor

from fairseq_hyperrouter.errors import UserError, option_name
from fairseq_hyperrouter.routing import Routing, losses
from fairseq_hyperrouter.workers import number_of_workers

Routings = Sequence[Optional[Routing]]


@dataclass
class RoutingLossConfig(FairseqDataclass):
    """Weights of the auxiliary losses; each is averaged over the MoE layers."""

    moe_gate_loss_wt: float = field(
        default=0.0, metadata={"help": "weight of the balance loss, E sum_i f_i P_i, 1 when experts are used evenly"}
    )
    moe_z_loss_wt: float = field(
        default=0.0, metadata={"help": "weight of the z-loss, mean logsumexp(router logits)^2"}
    )

    moe_mi_loss_wt: float = field(
        default=0.0,
        metadata={
            "help": "weight of the mutual information loss of DS-MoE, -H(mean p) + mean H(p); for dense training "
            "(--moe-top-k E) and sparse inference"
        },
    )
    moe_balance_batch: str = field(
        default="local",
        metadata={
            "help": "the tokens that the balance and the mutual information loss count the experts' shares over: those "
            "of each worker's own micro-batch (local), or those of all workers (global)"
        },
    )
    moe_log_layers: bool = field(
        default=False,
        metadata={
            "help": "log the routing of every MoE layer beside the means, as moe_router_entropy_layer0, for "
            "--tensorboard-logdir, --wandb-project and --log-format json"
        },
    )

    def check(self) -> None:
        """Raise a UserError (a ValueError) for a negative weight, or an unknown batch."""
        if self.moe_balance_batch not in ("local", "global"):
            raise UserError(f"--moe-balance-batch {self.moe_balance_batch!r}: choose from local, global")
        for name in ("moe_gate_loss_wt", "moe_z_loss_wt", "moe_mi_loss_wt"):
            if not 0 <= getattr(self, name) < math.inf:
                raise UserError(f"{option_name(name)} {getattr(self, name)}: must be at least 0, and finite")


def auxiliary_loss(routings: Routings, sums: Dict[str, Tensor], cfg: RoutingLossConfig) -> Optional[Tensor]:
    """The weighted auxiliary losses and the routers' own, averaged over the layers that ran; None when there are none.

    Args:
        sums: ``routing_sums`` of this micro-batch. With ``moe_balance_batch`` global (arXiv 2501.11873) those of all
            workers are added up, so all must call this together.
    """
    load, probability, tokens = (sums[name] for name in ("moe_load", "moe_probability", "moe_tokens"))
    balances = cfg.moe_gate_loss_wt > 0 or cfg.moe_mi_loss_wt > 0
    if balances and cfg.moe_balance_batch == "global" and number_of_workers() > 1:
        load, probability, tokens = (_over_workers(one) for one in (load, probability, tokens))
    share = probability / tokens[:, None].clamp(min=1)
    ran = [(routing, layer) for layer, routing in enumerate(routings) if routing is not None]
    total = None
    for weight, loss in (
        (cfg.moe_gate_loss_wt, lambda routing, layer: losses.balance_loss(routing, load[layer])),
        (cfg.moe_z_loss_wt, lambda routing, _: losses.z_loss(routing)),
        (cfg.moe_mi_loss_wt, lambda routing, layer: losses.mutual_information_loss(routing, share[layer])),
    ):
        if weight > 0 and ran:
            mean = weight * torch.stack([loss(routing, layer) for routing, layer in ran]).mean()
            total = mean if total is None else total + mean
    own = [routing.loss for routing, _ in ran if routing.loss is not None]
    if own:
        mean = torch.stack(own).sum() / len(ran)
        total = mean if total is None else total + mean
    return total


def _over_workers(one: Tensor) -> Tensor:
    one = one.clone()
    dist.all_reduce(one)
    return one


@torch.no_grad()
def routing_sums(routings: Routings, num_experts: int, device: torch.device, per_layer: bool = False) -> Dict[str, Any]:
    """Sums over tokens, one row per MoE layer, to be added over micro-batches and workers.

    A layer that LayerDrop left out has a row of zeros: workers add up tensors of the same shapes only.

    Args:
        per_layer: with what is logged of every layer alone.
    """
    nothing = Routing(
        torch.zeros(0, num_experts, device=device),
        torch.zeros(0, 1, dtype=torch.long, device=device),
        torch.zeros(0, 1, device=device),
    )
    sums = {
        name: torch.stack([total(nothing if routing is None else routing) for routing in routings])
        for name, total in {**_SUMS, **(_SUMS_PER_LAYER if per_layer else {})}.items()
    }
    return {**sums, "n_moe_layers": sum(routing is not None for routing in routings)}


_SUMS = {
    "moe_tokens": losses.num_tokens,
    "moe_load": losses.expert_load,
    "moe_probability": losses.probability_sum,
    "moe_entropy": losses.entropy_sum,
    "moe_dropped": losses.dropped_sum,
}
_SUMS_PER_LAYER = {
    "moe_outer_balance": losses.outer_balance_sum,
    "moe_margin": losses.margin_sum,
}


def log_routing(logging_outputs: List[Dict[str, Any]]) -> None:
    """Log the metrics of the whole batch, over all workers, as means over the MoE layers.

    moe_top_k           experts per token in force
    moe_balance_loss    E sum_i f_i P_i, 1 when even
    moe_router_entropy  of the softmax over all experts, nats; ln E when the router is undecided
    moe_load_imbalance  load of the fullest expert over the mean load; 1 when even
    moe_unused_experts  experts that no token chose
    moe_dropped         share of the assignments that were over a capacity

    With ``--moe-log-layers`` each of every layer too, moe_router_entropy_layer0 for the first, and

    moe_load_cv_layer0        standard deviation of the experts' loads over their mean; 0 when even
    moe_outer_balance_layer0  probability of a token's chosen experts together
    moe_margin_layer0         by how much a token's last chosen logit is above the next: what changes its experts
    """
    outputs = [output for output in logging_outputs if "moe_load" in output]
    weight = sum(output["n_moe_layers"] for output in outputs)
    if not weight:  # nothing to log: no MoE layer, or LayerDrop left all of them out
        return
    names = {**_SUMS, **_SUMS_PER_LAYER} if "moe_margin" in outputs[0] else _SUMS
    sums = {name: torch.as_tensor(sum(output[name] for output in outputs)) for name in names}
    tokens, load = sums["moe_tokens"], sums["moe_load"]
    ran = tokens > 0  # (L,)
    num_layers = ran.sum().clamp(min=1)
    assignments = load.sum(dim=-1).clamp(min=1)
    per_layer = {
        "moe_top_k": (assignments / tokens, 2),
        "moe_balance_loss": (losses.balance(load, sums["moe_probability"]), 3),
        "moe_router_entropy": (sums["moe_entropy"] / tokens, 3),
        "moe_load_imbalance": (load.max(dim=-1).values * load.size(-1) / assignments, 2),
        "moe_unused_experts": ((load == 0).sum(dim=-1).to(load), 2),
        "moe_dropped": (sums["moe_dropped"] / assignments, 4),
    }
    for name, (values, digits) in per_layer.items():
        mean = values.masked_fill(~ran, 0.0).sum() / num_layers
        metrics.log_scalar(name, mean, weight=weight, priority=600, round=digits)
    if names is _SUMS:
        return
    per_layer["moe_load_cv"] = (load.std(dim=-1, unbiased=False) * load.size(-1) / assignments, 3)
    per_layer["moe_outer_balance"] = (sums["moe_outer_balance"] / tokens, 3)
    per_layer["moe_margin"] = (sums["moe_margin"] / tokens, 3)
    layers = ran.nonzero().flatten().tolist()
    for name, (values, digits) in per_layer.items():
        for layer in layers:
            metrics.log_scalar(f"{name}_layer{layer}", values[layer], weight=weight, priority=700, round=digits)
