"""Which layers need how many experts: ``fairseq-hyperrouter allocate``."""

from typing import Dict, List, Optional, Sequence, Tuple

from tqdm import tqdm

from fairseq_hyperrouter.errors import UserError

from .evaluation import Evaluator, Row

Allocation = Tuple[int, ...]


def allocate(evaluator: Evaluator, choices: Sequence[int], budget: Optional[float] = None) -> List[Row]:
    """A list of k per MoE layer for every budget, from the smallest to the largest.

    1. Start with the largest of the *choices* in every layer.
    2. Of all lists in which one layer has its next smaller choice, take the one that loses least: the smallest rise of
       the loss per operation saved. Repeat until every layer has the smallest (or, with a *budget*, until it is met).

    Greedy: L layers and C choices cost about L^2 C / 2 evaluations, not C^L, and no list is revisited.

    Args:
        budget: FLOPs per token of a forward pass.

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
        if budget < least:
            raise UserError(f"--budget {budget / 1e6:g}: must be at least {least / 1e6:.2f}, that of k = {choices[0]}")
    found = [measured((choices[-1],) * layers)]
    with tqdm(total=layers * (len(choices) - 1), desc="lists of k", leave=False) as bar:
        while any(k > choices[0] for k in found[-1]["top_k"]):
            if budget is not None and found[-1]["flops_per_token"] <= budget:
                break
            now = found[-1]
            smaller = [measured(one) for one in _with_one_smaller(now["top_k"], choices)]
            found.append(min(smaller, key=lambda row: _loss_per_operation(now, row)))
            bar.update()
    return found[::-1]


def _with_one_smaller(allocation: Allocation, choices: Sequence[int]) -> List[Allocation]:
    lists = []
    for layer, k in enumerate(allocation):
        if k > choices[0]:
            next_smaller = choices[choices.index(k) - 1]
            lists.append((*allocation[:layer], next_smaller, *allocation[layer + 1 :]))
    return lists


def _loss_per_operation(before: Row, after: Row) -> float:
    rise = after["bits_per_token"] - before["bits_per_token"]
    return rise / (before["flops_per_token"] - after["flops_per_token"])
