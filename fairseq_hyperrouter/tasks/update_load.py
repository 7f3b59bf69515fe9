"""How many tokens each expert had in an update, over its micro-batches and all workers."""

from typing import Any, Dict, Optional

import torch
import torch.distributed as dist
from torch import Tensor

from fairseq_hyperrouter.moe_layer import moe_layers
from fairseq_hyperrouter.workers import number_of_workers


class UpdateLoad:
    """Adds up what the criterion logged of each micro-batch; nothing that runs in a forward pass.

    A forward pass that is made twice, as with activation checkpointing, is therefore counted once.
    """

    def __init__(self) -> None:
        self._sums: Optional[Tensor] = None

    def forget(self) -> None:
        """What was added belongs to an update that was not made, as after an overflow in fp16."""
        self._sums = None

    def add(self, logging_output: Dict[str, Any]) -> None:
        """Add a micro-batch."""
        sums = torch.cat([logging_output["moe_load"], logging_output["moe_tokens"][:, None]], dim=1)
        self._sums = sums if self._sums is None else self._sums + sums

    def tell(self, model: Any) -> None:
        """Give every router that learns from it the load of the update; all workers call this together."""
        layers = moe_layers(model)
        if self._sums is not None and any(layer.router.learns_from_load for layer in layers):
            if number_of_workers() > 1:
                dist.all_reduce(self._sums)
            for layer, sums in zip(layers, self._sums):
                if layer.router.learns_from_load:
                    layer.router.after_update(sums[:-1], sums[-1])
        self._sums = None
