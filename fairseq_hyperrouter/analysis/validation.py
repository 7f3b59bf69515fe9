"""What ``--moe-log-layers`` adds to a validation: the report's numbers that no Routing tells, of every MoE layer."""

import math
from contextlib import contextmanager
from typing import Any, Dict, Iterator, Tuple

import torch
from fairseq.logging import metrics
from torch import Tensor, nn

from fairseq_hyperrouter.moe_layer import moe_layers
from fairseq_hyperrouter.routing import Routing

from . import measures
from .layer_numbers import SAMPLE, of_experts
from .observation import observed
from .seen import at, seen_tokens

LOGGED = ("mean_output_similarity", "mean_weight_similarity", "hidden_rank", "jacobian_rank", "jacobian_span")


class ValidationLog:
    """Measure the layers in the first batch of every validation set, as the report measures them on a whole text.

    With them is logged moe_changed_layer0: the share of the batch's tokens that have other experts than when this
    process validated last. Each worker measures its own batch, and those of the first are shown.
    """

    def __init__(self) -> None:
        self._due, self._which = False, 0
        self._chosen: Dict[Tuple[int, int], Tensor] = {}

    def begin(self) -> None:
        """A validation begins, with its first set."""
        self._due, self._which = True, 0

    def next_set(self) -> None:
        """A set is done; there may be another."""
        self._due, self._which = True, self._which + 1

    @contextmanager
    def measured(self, model: nn.Module) -> Iterator[None]:
        """Measure and log inside the ``with`` block, where the *model* computes a batch, where still to be done."""
        layers = moe_layers(model) if self._due else []
        self._due = False

        def measure(number: int, x: Tensor, arguments: Dict[str, Any], routing: Routing) -> None:
            tokens = seen_tokens(torch.arange(len(routing.logits), device=x.device), x, arguments, routing)
            sample = at(tokens, slice(None, None, max(1, len(tokens.number) // SAMPLE)))
            found = of_experts(layers[number], sample, arguments["top_k"], arguments["limit"])
            values = {name: found[name] for name in LOGGED}
            values["changed"] = self._changed(number, tokens.routing.chosen_mask())
            for name, value in values.items():
                if value is not None and math.isfinite(value):
                    metrics.log_scalar(f"moe_{name}_layer{number}", value, priority=700, round=3)

        with observed(layers, measure):
            yield

    def _changed(self, layer: int, chosen: Tensor) -> Any:
        before = self._chosen.get((self._which, layer))
        self._chosen[self._which, layer] = chosen
        return None if before is None or before.shape != chosen.shape else measures.changed(before, chosen).item()
