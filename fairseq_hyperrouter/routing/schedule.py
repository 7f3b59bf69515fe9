"""How many experts per token are active at an update.

k goes from ``start`` to ``end`` over ``updates`` updates; with start > end it falls. At update t of T,
t = 0 .. T - 1 (and any later one, which counts as T):

    constant     k = end
    linear       k = round(start + (end - start) t / T)
    cosine       the same with (1 - cos(pi t / T)) / 2 in the place of t / T
    exponential  the same with (1 - 0.99^(300 t / T)) / (1 - 0.99^300)
    steps        start, 2 start, 4 start, ... end (or halving), each for the same number of updates
    elastic      drawn at random from ``choices``, anew for every update, update and layer, or token; with a start,
                 from those up to a bound that goes linearly from start to end

The first five are those of SMoE-Dropout (arXiv 2303.01610) and HyperRouter (arXiv 2312.07035) without their
division by zero at small T and their step off the list at t = T; their exponential one stops at 95 % of the
way, ours is stretched to arrive. Elastic k is that of Matryoshka MoE (arXiv 2509.26520).
A schedule has no state: k depends on the update number (and the seed) alone, so it survives a resume.
"""

import math
import random
from dataclasses import dataclass
from typing import Callable, Dict, Optional, Sequence, Tuple

import torch
from torch import Tensor

from fairseq_hyperrouter.errors import UserError

_PROGRESS: Dict[str, Callable[[float], float]] = {
    "linear": lambda s: s,
    "cosine": lambda s: (1 - math.cos(math.pi * s)) / 2,
    "exponential": lambda s: (1 - 0.99 ** (300 * s)) / (1 - 0.99**300),
}
SCHEDULES = ("constant", *_PROGRESS, "steps", "elastic")
ELASTIC_PER = ("update", "layer", "token")


def doubling(start: int, end: int) -> Tuple[int, ...]:
    """start, 2 start, 4 start, ... and last end; from the larger to the smaller when start > end.

    >>> doubling(1, 12), doubling(16, 2)
    ((1, 2, 4, 8, 12), (16, 8, 4, 2))
    """
    low, high = sorted((start, end))
    values = []
    while low < high:
        values.append(low)
        low *= 2
    values.append(high)
    return tuple(values if start <= end else reversed(values))


@dataclass(frozen=True)
class TopKSchedule:
    """k as a function of the update number and the layer.

    Args:
        name: one of SCHEDULES.
        end: k at the end of training; the largest k that ``elastic`` draws.
        start: k at update 0; default: 1, and for elastic no bound but ``end``.
        updates: updates in the whole of training, T; needed by all but constant, and elastic without a start.
        choices: what ``elastic`` draws from, each with the same chance, so one given twice has twice the chance;
            default: 1, 2, 4, ... and ``end``.
        per: whether ``elastic`` draws one k per "update" for all layers, one per update and "layer", or one for every
            "token" in every layer.
        seed: of the draws.

    Raises:
        UserError (a ValueError): naming the argument, its value and what is allowed.
    """

    name: str = "constant"
    end: int = 2
    start: Optional[int] = None
    updates: int = 0
    choices: Optional[Sequence[int]] = None
    per: str = "layer"
    seed: int = 1

    def __post_init__(self) -> None:
        if self.name not in SCHEDULES:
            raise UserError(f"--moe-top-k-schedule {self.name!r}: choose from {', '.join(SCHEDULES)}")
        if self.per not in ELASTIC_PER:
            raise UserError(f"--moe-elastic-per {self.per!r}: choose from {', '.join(ELASTIC_PER)}")
        for argument, k in (("--moe-top-k", self.end), ("--moe-top-k-start", self.start)):
            if k is not None and (not isinstance(k, int) or k < 1):
                raise UserError(f"{argument} {k}: must be an integer, at least 1")
        if self.needs_updates and self.updates < 1:
            raise UserError(
                f"--moe-top-k-schedule {self.name}: needs to know the number of updates, "
                "set --max-update or --moe-top-k-schedule-updates to at least 1"
            )
        if self.name == "elastic" and self.start is not None and self.start > self.end:
            raise UserError(f"--moe-top-k-start {self.start}: elastic grows, at most --moe-top-k ({self.end})")
        if self.name == "elastic" and not all(isinstance(k, int) and 1 <= k <= self.end for k in self._choices):
            drawn = ",".join(map(str, self._choices))
            raise UserError(f"--moe-top-k-choices {drawn}: each must be an integer from 1 to --moe-top-k ({self.end})")

    @property
    def largest(self) -> int:
        """The most experts that a token may have at any update; with it a model teaches itself, drawn or not."""
        return max(self.end, self.start or 1)

    @property
    def needs_updates(self) -> bool:
        return self.start is not None if self.name == "elastic" else self.name != "constant"

    @property
    def _choices(self) -> Sequence[int]:
        return self.choices or doubling(1, self.end)

    def __call__(self, update: int, layer: int = 0) -> int:
        """Experts per token at *update* (from 0) in *layer*; the most of any token where k is drawn per token."""
        if self.name == "constant":
            return self.end
        if self.name == "elastic":
            choices = self._choices_at(update)
            if self.per == "token":
                return max(choices)
            # A string seed is hashed by random.Random itself: the same on every machine and Python.
            place = f"{self.seed} {update} {layer if self.per == 'layer' else 0}"
            return random.Random(place).choice(choices)
        if self.name == "steps":
            values = doubling(self.start or 1, self.end)
            return values[min(int(self._done(update) * len(values)), len(values) - 1)]
        return self._between(_PROGRESS[self.name](self._done(update)))

    def per_token(self, update: int, tokens: int, device: torch.device) -> Optional[Tensor]:
        """(tokens,) int64, the experts of each token by the global generator; None unless drawn per token."""
        if self.name != "elastic" or self.per != "token":
            return None
        choices = torch.tensor(self._choices_at(update), device=device)
        return choices[torch.randint(len(choices), (tokens,), device=device)]

    def _choices_at(self, update: int) -> Sequence[int]:
        if self.start is None:
            return self._choices
        bound = self._between(self._done(update))
        return [k for k in self._choices if k <= bound] or [min(self._choices)]

    def _done(self, update: int) -> float:
        return min(max(update, 0) / self.updates, 1.0)

    def _between(self, progress: float) -> int:
        start = self.start or 1
        # floor(x + 1/2): Python's round() sends .5 to the even neighbour and makes uneven stages.
        return math.floor(start + (self.end - start) * progress + 0.5)

    def __str__(self) -> str:
        if self.name == "constant":
            return f"constant {self.end}"
        if self.name == "elastic":
            drawn = ",".join(map(str, self._choices))
            growing = "" if self.start is None else f", up to {self.start} -> {self.end} over {self.updates} updates"
            return f"elastic, drawn from {drawn} per {self.per}{growing}"
        return f"{self.name} {self.start or 1} -> {self.end} over {self.updates} updates"
