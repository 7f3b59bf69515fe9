"""``--criterion moe_cross_entropy``: cross entropy, with the routers' auxiliary losses in training."""

from dataclasses import dataclass, field
from typing import Any, Dict, List, Optional, Tuple

import torch
import torch.nn.functional as F
from fairseq.criterions import register_criterion
from fairseq.criterions.cross_entropy import CrossEntropyCriterion, CrossEntropyCriterionConfig
from torch import Tensor

from fairseq_hyperrouter.errors import UserError

from .auxiliary_loss import AuxiliaryLossConfig, auxiliary_loss
from .routing_metrics import log_routing, routing_sums

ELASTIC_DISTILL_WEIGHT = 0.5


@dataclass
class MoECrossEntropyConfig(AuxiliaryLossConfig, CrossEntropyCriterionConfig):
    """Stock cross_entropy's option, the weights of the auxiliary losses, what is logged, and distillation."""

    moe_log_layers: bool = field(
        default=False,
        metadata={
            "help": "log the routing of every MoE layer beside the means, as moe_router_entropy_layer0, for "
            "--tensorboard-logdir, --wandb-project and --log-format json"
        },
    )
    moe_distill_wt: Optional[float] = field(
        default=None,
        metadata={
            "help": "teach the model at the schedule's experts per token with what it says at --moe-top-k, computed in "
            "the same update: the weight of the teacher's words beside the text's, 0 (off) to 1 (default: 0.5 with an "
            "elastic schedule, else 0)"
        },
    )

    def check(self) -> None:
        super().check()
        if self.moe_distill_wt is not None and not 0 <= self.moe_distill_wt <= 1:
            raise UserError(f"--moe-distill-wt {self.moe_distill_wt}: must be between 0 and 1")


@register_criterion("moe_cross_entropy", dataclass=MoECrossEntropyConfig)
class MoECrossEntropyCriterion(CrossEntropyCriterion):
    """loss = cross entropy + the weighted auxiliary losses: balance, z, mutual information, and the routers' own.

    The logged loss, nll_loss and ppl are the cross entropy alone; the auxiliary part is only in what is
    differentiated. It is weighted like the tokens, so gradient accumulation and several workers average it.
    Works with a plain, tied or adaptive softmax.

    With a ``moe_distill_wt`` w, by default with an elastic schedule, every batch is computed twice in training: with
    the k of the schedule and with the largest K (the sandwich of slimmable networks, arXiv 1903.05134). Beside the
    auxiliary losses, loss = (CE_K + (1 - w) CE_k + w KL(p_K || p_k)) / 2, p_K without gradient; CE_k and the routing of
    k are what is logged.
    """

    def __init__(self, cfg: MoECrossEntropyConfig, task: Any) -> None:
        super().__init__(task, cfg.sentence_avg)
        self.cfg = cfg

    @classmethod
    def build_criterion(cls, cfg: MoECrossEntropyConfig, task: Any) -> "MoECrossEntropyCriterion":
        cfg = MoECrossEntropyConfig.from_namespace(cfg)
        cfg.check()
        return cls(cfg, task)

    def forward(self, model: Any, sample: Dict[str, Any], reduce: bool = True) -> Tuple[Tensor, Any, Dict[str, Any]]:
        """Return the loss to differentiate, the sample size and what is logged."""
        net_output = model(**sample["net_input"])
        loss, _ = self.compute_loss(model, net_output, sample, reduce=reduce)
        sample_size = sample["target"].size(0) if self.sentence_avg else sample["ntokens"]
        routings = net_output[1].get("routing", ())
        logging_output = {
            "loss": loss.data,
            "ntokens": sample["ntokens"],
            "nsentences": sample["target"].size(0),
            "sample_size": sample_size,
        }
        if routings:
            num_experts = model.decoder.moe_config.moe_expert_count
            logging_output.update(routing_sums(routings, num_experts, loss.device, self.cfg.moe_log_layers))
        weight = self._distill_weight(model) if self.training and reduce and routings else 0.0
        if weight:
            loss = self._distilled(model, net_output, sample, loss, weight)
        if self.training and reduce and routings:
            counts = not sample.get("is_dummy", False)
            sums = {name: value * counts for name, value in logging_output.items() if name.startswith("moe_")}
            auxiliary = auxiliary_loss(routings, sums, self.cfg)
            loss = loss if auxiliary is None else loss + sample_size * auxiliary
        return loss, sample_size, logging_output

    def _distill_weight(self, model: Any) -> float:
        if self.cfg.moe_distill_wt is not None:
            return self.cfg.moe_distill_wt
        return ELASTIC_DISTILL_WEIGHT if model.decoder.schedule.name == "elastic" else 0.0

    def _distilled(
        self, model: Any, net_output: Tuple[Tensor, Any], sample: Dict[str, Any], loss: Tensor, weight: float
    ) -> Tensor:
        with model.decoder.at_largest_top_k():
            largest = model(**sample["net_input"])
        teacher_loss, _ = self.compute_loss(model, largest, sample)
        teacher, student = (_log_probabilities(model, output) for output in (largest, net_output))
        per_token = F.kl_div(student, teacher.detach(), log_target=True, reduction="none").sum(-1)
        divergence = per_token.masked_fill(sample["target"].eq(self.padding_idx), 0).sum()
        return (teacher_loss + (1 - weight) * loss + weight * divergence) / 2

    def compute_loss(
        self, model: Any, net_output: Tuple[Tensor, Any], sample: Dict[str, Any], reduce: bool = True
    ) -> Tuple[Tensor, Tensor]:
        adaptive_softmax = model.decoder.adaptive_softmax
        if adaptive_softmax is None:
            return super().compute_loss(model, net_output, sample, reduce=reduce)
        target = model.get_targets(sample, net_output).view(-1)
        cluster_logits, cluster_targets = adaptive_softmax(net_output[0], target)
        # Padding is in the head. Stock adaptive_loss ignores its number in the tails too, where it is a word.
        loss = F.cross_entropy(
            cluster_logits[0].float(), cluster_targets[0], ignore_index=self.padding_idx, reduction="sum"
        )
        for logits, cluster in zip(cluster_logits[1:], cluster_targets[1:]):
            if cluster is not None:
                loss = loss + F.cross_entropy(logits.float(), cluster, reduction="sum")
        return loss, loss

    @staticmethod
    def reduce_metrics(logging_outputs: List[Dict[str, Any]]) -> None:
        """Aggregate what the workers logged."""
        CrossEntropyCriterion.reduce_metrics(logging_outputs)
        log_routing(logging_outputs)


def _log_probabilities(model: Any, net_output: Tuple[Tensor, Any]) -> Tensor:
    """(B, T, V); the stock method of an adaptive softmax works in place, so no gradient could pass."""
    softmax = model.decoder.adaptive_softmax
    if softmax is None:
        return model.get_normalized_probs(net_output, log_probs=True).float()
    features, first = net_output[0], softmax.cutoff[0]
    head = softmax.head(features).float().log_softmax(-1)
    tails = [tail(features).float().log_softmax(-1) for tail in softmax.tail]
    return torch.cat([head[..., :first], *(t + head[..., first + i, None] for i, t in enumerate(tails))], dim=-1)
