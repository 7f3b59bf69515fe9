"""``--criterion moe_cross_entropy``: cross entropy, with the routers' auxiliary losses in training."""

from dataclasses import dataclass, field
from typing import Any, Dict, List, Optional, Tuple

import torch
import torch.nn.functional as F
from fairseq.criterions import register_criterion
from fairseq.criterions.cross_entropy import CrossEntropyCriterion, CrossEntropyCriterionConfig
from torch import Tensor

from fairseq_hyperrouter.config import distill_weight
from fairseq_hyperrouter.errors import UserError

from .auxiliary_loss import AuxiliaryLossConfig, auxiliary_loss
from .routing_metrics import log_routing, routing_sums

IGNORED = -100  # the target of padding

Cluster = Tuple[Tensor, Tensor]  # logarithms of probabilities (N, V), targets (N,)


@dataclass
class MoECrossEntropyConfig(AuxiliaryLossConfig, CrossEntropyCriterionConfig):
    """Stock cross_entropy's option, the weights of the auxiliary losses, what is logged, and distillation."""

    moe_log_layers: bool = field(
        default=False,
        metadata={
            "help": "log the routing of every MoE layer beside the means, as moe_router_entropy_layer0, and at every "
            "validation how alike its experts are and of what rank what it routes, for --tensorboard-logdir, "
            "--wandb-project and --log-format json"
        },
    )
    moe_distill_wt: Optional[float] = field(
        default=None,
        metadata={
            "help": "self-distillation: every batch is computed twice, at the schedule's k and at its largest; the "
            "largest learns from the text, the other from the largest's predictions with this weight and from the text "
            "with the rest of 1; 0: off, and no second pass (default: 1 with an elastic schedule, else 0; not with "
            "relu)"
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
    k are what is logged. The KL of an adaptive softmax is that of its head, and of its tails where the target is: what
    the cross entropy computes anyway.
    """

    def __init__(self, cfg: MoECrossEntropyConfig, task: Any) -> None:
        super().__init__(task, cfg.sentence_avg)
        self.cfg = cfg
        self.logs_layers = cfg.moe_log_layers

    @classmethod
    def build_criterion(cls, cfg: MoECrossEntropyConfig, task: Any) -> "MoECrossEntropyCriterion":
        cfg = MoECrossEntropyConfig.from_namespace(cfg)
        cfg.check()
        return cls(cfg, task)

    def forward(self, model: Any, sample: Dict[str, Any], reduce: bool = True) -> Tuple[Tensor, Any, Dict[str, Any]]:
        """Return the loss to differentiate, the sample size and what is logged."""
        net_output = model(**sample["net_input"])
        student = self._log_probabilities(model, net_output, sample)
        loss = _cross_entropy(student, reduce)
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
            logging_output.update(routing_sums(routings, num_experts, loss.device, self.logs_layers))
        weight = self._distill_weight(model) if self.training and reduce and routings else 0.0
        if weight:
            with model.decoder.at_largest_top_k():
                teacher = self._log_probabilities(model, model(**sample["net_input"]), sample)
            own = (1 - weight) * loss + weight * _divergence(teacher, student)
            loss = (_cross_entropy(teacher) + own) / 2
        if self.training and reduce and routings:
            counts = not sample.get("is_dummy", False)
            sums = {name: value * counts for name, value in logging_output.items() if name.startswith("moe_")}
            auxiliary = auxiliary_loss(routings, sums, self.cfg)
            loss = loss if auxiliary is None else loss + sample_size * auxiliary
        return loss, sample_size, logging_output

    def _distill_weight(self, model: Any) -> float:
        return distill_weight(self.cfg, model.decoder.moe_config)

    def _log_probabilities(self, model: Any, net_output: Tuple[Tensor, Any], sample: Dict[str, Any]) -> List[Cluster]:
        """Of all words; or of the head of an adaptive softmax, and of each tail for the tokens whose target is there.

        Padding's target is IGNORED. Stock adaptive_loss ignores its number in the tails too, where it is a word.
        """
        target, adaptive_softmax = model.get_targets(sample, net_output).view(-1), model.decoder.adaptive_softmax
        if adaptive_softmax is None:
            log_probs = model.get_normalized_probs(net_output, log_probs=True)
            clusters = [(log_probs.view(len(target), -1), target)]
        else:
            outputs = zip(*adaptive_softmax(net_output[0], target))
            clusters = [(y.log_softmax(-1, dtype=torch.float32), of_it) for y, of_it in outputs if y is not None]
        (log_probs, target), *tails = clusters
        return [(log_probs, target.masked_fill(target.eq(self.padding_idx), IGNORED)), *tails]

    @staticmethod
    def reduce_metrics(logging_outputs: List[Dict[str, Any]]) -> None:
        """Aggregate what the workers logged."""
        CrossEntropyCriterion.reduce_metrics(logging_outputs)
        log_routing(logging_outputs)


def _cross_entropy(clusters: List[Cluster], reduce: bool = True) -> Tensor:
    reduction = "sum" if reduce else "none"
    return sum(F.nll_loss(*cluster, ignore_index=IGNORED, reduction=reduction) for cluster in clusters)


def _divergence(teacher: List[Cluster], student: List[Cluster]) -> Tensor:
    """KL(teacher || student), summed over the tokens; none for the teacher's gradient."""
    total = 0.0
    for (log_p, target), (log_q, _) in zip(teacher, student):
        per_token = F.kl_div(log_q, log_p.detach(), log_target=True, reduction="none").sum(-1)
        total = total + per_token.masked_fill(target.eq(IGNORED), 0).sum()
    return total
