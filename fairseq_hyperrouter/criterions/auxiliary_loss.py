"""The routers' auxiliary losses, weighted, for any criterion."""

import math
from dataclasses import dataclass, field
from typing import Dict, Optional

import torch
import torch.distributed as dist
from fairseq.dataclass import FairseqDataclass
from torch import Tensor

from fairseq_hyperrouter.errors import UserError, option_name
from fairseq_hyperrouter.routing import losses
from fairseq_hyperrouter.workers import number_of_workers

from .routing_metrics import Routings


@dataclass
class AuxiliaryLossConfig(FairseqDataclass):
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

    def check(self) -> None:
        """Raise a UserError (a ValueError) for a negative weight, or a batch that is unknown or of no loss."""
        if self.moe_balance_batch not in ("local", "global"):
            raise UserError(f"--moe-balance-batch {self.moe_balance_batch!r}: choose from local, global")
        for name in ("moe_gate_loss_wt", "moe_z_loss_wt", "moe_mi_loss_wt"):
            if not 0 <= getattr(self, name) < math.inf:
                raise UserError(f"{option_name(name)} {getattr(self, name)}: must be at least 0, and finite")
        if self.moe_balance_batch == "global" and not self.counts_shares:
            raise UserError("--moe-balance-batch global: means nothing without --moe-gate-loss-wt or --moe-mi-loss-wt")

    @property
    def counts_shares(self) -> bool:
        """Whether a loss of the experts' shares of a batch is added."""
        return self.moe_gate_loss_wt > 0 or self.moe_mi_loss_wt > 0


def auxiliary_loss(routings: Routings, sums: Dict[str, Tensor], cfg: AuxiliaryLossConfig) -> Optional[Tensor]:
    """The weighted auxiliary losses and the routers' own, averaged over the layers that ran; None when there are none.

    Args:
        sums: ``routing_sums`` of this micro-batch. With ``moe_balance_batch`` global (arXiv 2501.11873) those of all
            workers are added up, so all must call this together.
    """
    load, probability, tokens = (sums[name] for name in ("moe_load", "moe_probability", "moe_tokens"))
    if cfg.counts_shares and cfg.moe_balance_batch == "global" and number_of_workers() > 1:
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
