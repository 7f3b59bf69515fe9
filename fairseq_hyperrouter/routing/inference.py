"""What a module computes from its weights once, when it is only used for inference."""

from typing import Any, Callable, Dict, Hashable, TypeVar

import torch
from torch import nn

Value = TypeVar("Value")


class InferenceCache(nn.Module):
    """A module that may keep what follows from its weights alone, from ``make_generation_fast_`` on.

    fairseq calls that on every module of a model that is only used for inference (fairseq-generate, fairseq-eval-lm,
    ...). Weights that are loaded or drawn, another device, another dtype and training make what is kept be forgotten;
    weights that are changed in place do not.
    """

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        self.for_inference = False
        self._computed: Dict[Hashable, Any] = {}

    def make_generation_fast_(self, **_: Any) -> None:
        self.for_inference = True

    def once(self, key: Hashable, compute: Callable[[], Value]) -> Value:
        """What *compute* returned when it was first called for *key*; computed every time while training may come."""
        if not self.for_inference:
            return compute()
        if key not in self._computed:
            with torch.no_grad():
                self._computed[key] = compute()
        return self._computed[key]

    def forget(self) -> None:
        """Compute anew: the weights are others."""
        self._computed.clear()

    def train(self, mode: bool = True) -> "InferenceCache":
        if mode:
            self.for_inference = False
            self.forget()
        return super().train(mode)

    def _apply(self, *args: Any, **kwargs: Any) -> "InferenceCache":
        self.forget()
        return super()._apply(*args, **kwargs)

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        self.forget()
        super()._load_from_state_dict(*args, **kwargs)
