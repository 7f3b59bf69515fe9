"""Which layers need how many experts: ``fairseq-hyperrouter allocate``."""

import math
from typing import Dict, Iterable, List, Optional, Sequence, Tuple

from tqdm import tqdm

from fairseq_hyperrouter.errors import UserError

from .evaluation import Evaluator
from .row import Row

Allocation = Tuple[int, ...]


def allocate(evaluator: Evaluator, choices: Sequence[int], budget: Optional[float] = None) -> List[Row]:
    """Lists of k per MoE layer, each better than all that cost less, from the cheapest to the best.

    1. Start with the largest of the *choices* in every layer.
    2. Of all lists in which one layer has its next smaller choice, take the one that loses least: the smallest rise of
       the loss per operation saved. Repeat until every layer has the smallest.
    3. Of all that were measured on the way, and the lists with one k for all layers, leave out those that a cheaper one
       beats: a model that was trained with few experts may be best with few.
    4. With a *budget*, from the best list within it: as long as one is better that has the next larger choice in one
       layer, or that and the next smaller in another, take the best of those within the budget.

    Greedy: L layers and C choices cost about L^2 C / 2 evaluations, not C^L, and L^2 for each step of 4. No list is
    evaluated twice.

    Args:
        budget: FLOPs per token of a forward pass; only the best list within it is returned.

    Raises:
        UserError (a ValueError): a model without experts, or a budget below that of the smallest list.
    """
    if not evaluator.has_experts:
        raise UserError(f"CHECKPOINT {evaluator.path}: has no experts")
    choices = sorted(set(choices))
    known: Dict[Allocation, Row] = {}

    def measured(allocation: Allocation) -> Row:
        if allocation not in known:
            known[allocation] = evaluator.at(allocation, show=False)
        return known[allocation]

    layers = len(evaluator.layers)
    if budget is not None:
        least = measured((choices[0],) * layers)["flops_per_token"]
        if not budget >= least:
            raise UserError(
                f"--budget {budget / 1e6:g}: must be at least {math.ceil(least / 1e4) / 100:.2f} MFLOPs per token, "
                f"that of k = {choices[0]}"
            )
    now = measured((choices[-1],) * layers)
    with tqdm(total=layers * (len(choices) - 1), desc="lists of k", leave=False) as bar:
        while any(k > choices[0] for k in now["top_k"]):
            smaller = [measured(one) for one in _with_one_step(now["top_k"], choices, -1)]
            now = min(smaller, key=lambda row, now=now: _loss_per_operation(now, row))
            bar.update()
    for k in choices:
        measured((k,) * layers)
    best = _better_than_cheaper(known.values())
    if budget is None:
        return best
    now = [row for row in best if row["flops_per_token"] <= budget][-1]
    while True:
        near = [measured(one) for one in tqdm(_near(now["top_k"], choices), desc="lists near the best", leave=False)]
        within = [row for row in near if row["flops_per_token"] <= budget]
        better = min([now, *within], key=lambda row: row["bits_per_token"])
        if better is now:
            return [now]
        now = better


def _better_than_cheaper(rows: Iterable[Row]) -> List[Row]:
    best: List[Row] = []
    for row in sorted(rows, key=lambda row: (row["flops_per_token"], row["bits_per_token"])):
        if not best or row["bits_per_token"] < best[-1]["bits_per_token"]:
            best.append(row)
    return best


def _with_one_step(allocation: Allocation, choices: Sequence[int], step: int) -> List[Allocation]:
    """All lists in which one layer has its next larger (*step* 1) or smaller (-1) choice."""
    lists = []
    for layer, k in enumerate(allocation):
        place = choices.index(k) + step
        if 0 <= place < len(choices):
            lists.append((*allocation[:layer], choices[place], *allocation[layer + 1 :]))
    return lists


def _near(allocation: Allocation, choices: Sequence[int]) -> List[Allocation]:
    """All lists in which one layer has its next larger choice, alone or with another layer's next smaller."""
    larger = _with_one_step(allocation, choices, 1)
    both = (one for more in larger for one in _with_one_step(more, choices, -1))
    return list(dict.fromkeys([*larger, *(one for one in both if one != allocation)]))


def _loss_per_operation(before: Row, after: Row) -> float:
    rise = after["bits_per_token"] - before["bits_per_token"]
    saved = before["flops_per_token"] - after["flops_per_token"]
    if saved <= 0:  # of a router that never gives a token so many experts
        return -math.inf if rise <= 0 else math.inf
    return rise / saved
