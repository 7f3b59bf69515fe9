"""Balanced assignment of tokens to experts, by auction (Bertsekas 1992; for experts Lewis et al., arXiv 2103.16716).

Dimensions: T tokens, E experts.
"""

import torch
from torch import Tensor

ROUNDS = 500


@torch.no_grad()
def balanced_assignment(scores: Tensor) -> Tensor:
    """Give every expert T / E tokens, or one more where that is no whole number, so that the sum of scores is large.

    0. Take off the mean of every expert's scores, which moves the totals of all balanced assignments alike.
    1. Every token without an expert bids for the one where score less price is best: as much as it could pay and still
       not prefer its second best, and a little more.
    2. An expert keeps the highest bids that it has room for; when it is full its price is the lowest of them.
    3. Ended so, the total is at most T times that little below the best. Tokens that still wait after 500 rounds (many
       that score nearly alike) take the free places one by one, and nothing is promised of the total.

    Args:
        scores: (T, E).

    Returns:
        (T,) int64.
    """
    tokens, experts = scores.shape
    if experts == 1 or tokens == 0:
        return torch.zeros(tokens, dtype=torch.long, device=scores.device)
    room = torch.full((experts,), tokens // experts, device=scores.device)
    room[scores.sum(0).topk(tokens % experts).indices] += 1
    scores = scores.double()
    scores = scores - scores.mean(0) - (scores - scores.mean(0)).mean(1, keepdim=True)
    least_raise = max((scores.max() - scores.min()).item() / 1000, 1e-9)
    expert = torch.full((tokens,), -1, dtype=torch.long, device=scores.device)
    bid = torch.zeros(tokens, dtype=scores.dtype, device=scores.device)
    price = torch.zeros(experts, dtype=scores.dtype, device=scores.device)
    price[room == 0] = torch.inf
    for _ in range(ROUNDS):
        waiting = (expert < 0).nonzero().squeeze(1)
        if not len(waiting):
            return expert
        best = (scores[waiting] - price).topk(2, dim=1)
        expert[waiting] = best.indices[:, 0]
        gain = (best.values[:, 0] - best.values[:, 1]).clamp(max=1e9)  # the second best may have no room at all
        bid[waiting] = price[best.indices[:, 0]] + gain + least_raise
        _keep_highest_bids(expert, bid, price, room)
    for token in (expert < 0).nonzero().squeeze(1).tolist():
        free = torch.bincount(expert[expert >= 0], minlength=experts) < room
        expert[token] = scores[token].masked_fill(~free, -torch.inf).argmax()
    return expert


def _keep_highest_bids(expert: Tensor, bid: Tensor, price: Tensor, room: Tensor) -> None:
    """Send away, in place, the lowest bids over each expert's room, and set the prices of full experts."""
    holding = (expert >= 0).nonzero().squeeze(1)
    by_bid = holding[bid[holding].argsort(descending=True, stable=True)]
    by_expert = by_bid[expert[by_bid].argsort(stable=True)]
    sorted_expert = expert[by_expert]
    start = torch.searchsorted(sorted_expert, torch.arange(len(room), device=room.device))
    place = torch.arange(len(by_expert), device=room.device) - start[sorted_expert]
    last = by_expert[place == room[sorted_expert] - 1]
    price[expert[last]] = bid[last]
    expert[by_expert[place >= room[sorted_expert]]] = -1
