"""What ``--moe-log-layers`` adds to a validation: the report's numbers that no Routing tells, of every MoE layer."""

import math
from typing import Any, Dict, Optional, Sized, Tuple

import torch
from fairseq.logging import metrics
from torch import Tensor, nn

from fairseq_hyperrouter.moe_layer import moe_layers
from fairseq_hyperrouter.routing import Routing

from . import measures
from .layer_numbers import LOOK_AT, SAMPLE, of_experts
from .observation import observed
from .seen import at, seen_tokens

LOGGED = ("mean_output_similarity", "mean_weight_similarity", "hidden_rank", "jacobian_rank", "jacobian_span")


class ValidationLog:
    """Measure the layers in one batch of every validation set, as the report measures them on a whole text.

    That is the middle batch, as the first may hold the shortest samples; of its tokens SAMPLE are drawn, always the
    same, and have LOOK_AT experts, as in a report: with all experts, which a growing k validates with, nothing would
    ever change. Also logged is moe_changed_layer0: the share of the batch's tokens that have other experts than when
    this process validated last. Each worker measures its own batch, and those of the first are shown.
    """

    def __init__(self) -> None:
        self._coming: Optional[Tuple[Sized, float]] = None
        self._left: Optional[int] = None
        self._sets: Optional[int] = None
        self._chosen: Dict[Tuple[int, int], Tensor] = {}

    def begin(self) -> None:
        """A training begins to validate."""
        self._sets = 0

    def begin_set(self, batches: Sized, at_most: float = math.inf) -> None:
        """The *batches* that come, *at_most* so many, are those of the next set; counted only when needed."""
        if self._sets is not None:
            self._coming, self._sets = (batches, at_most), self._sets + 1

    @torch.no_grad()
    def look(self, model: nn.Module, sample: Dict[str, Any]) -> None:
        """The *model* has validated a batch; compute it once more to measure and log, when it is the middle one."""
        if self._coming is not None:
            batches, at_most = self._coming
            self._coming, self._left = None, int(min(len(batches), at_most)) // 2
        due = self._left == 0
        if self._left is not None:
            self._left -= 1
        layers = moe_layers(model) if due else []
        if not layers:
            return

        def measure(number: int, x: Tensor, arguments: Dict[str, Any], routing: Routing) -> None:
            tokens = seen_tokens(torch.arange(len(routing.logits), device=x.device), x, arguments, routing)
            drawn = torch.randperm(len(tokens.number), generator=torch.Generator().manual_seed(0))[:SAMPLE]
            sample = at(tokens, drawn.to(x.device))
            found = of_experts(layers[number], sample, arguments["top_k"], arguments["limit"])
            values = {name: found[name] for name in LOGGED}
            values["changed"] = self._changed(number, tokens.routing.chosen_mask())
            for name, value in values.items():
                if value is not None:
                    metrics.log_scalar(f"moe_{name}_layer{number}", value, priority=700, round=3)

        with model.at_top_k(min(LOOK_AT, layers[0].router.num_experts)), observed(layers, measure):
            model(**sample["net_input"])

    def _changed(self, layer: int, chosen: Tensor) -> Optional[float]:
        before = self._chosen.get((self._sets, layer))
        self._chosen[self._sets, layer] = chosen
        return None if before is None or before.shape != chosen.shape else measures.changed(before, chosen).item()
