"""What is measured of a Routing: token by token, and of the load of its experts.

Dimensions: T tokens, E experts. What is measured of padding means nothing; who adds up leaves it out.
"""

import math

from torch import Tensor

from .routing import Routing


def entropy(routing: Routing) -> Tensor:
    """(T,) entropy of softmax(z) over all E experts, in nats: from 0, sure of one expert, to ln E, undecided."""
    log_p = routing.logits.log_softmax(dim=-1)
    return -(log_p.exp() * log_p).sum(dim=-1)


def largest_entropy(num_experts: int) -> float:
    """ln E, what a normalised entropy is the share of; ln 2 with one expert, whose entropy is 0."""
    return math.log(max(2, num_experts))


def log_inner_balance(routing: Routing) -> Tensor:
    """(T,) ln (p1 / p2), of the probability of the best expert over that of the second (RMoE, arXiv 2408.06793).

    0 where there is no second. Of many tokens the geometric mean of p1 / p2 is reported: some are sure beyond measure.
    """
    largest = routing.logits.topk(min(2, routing.logits.size(-1)), dim=-1).values
    return largest[:, 0] - largest[:, -1]


def outer_balance(routing: Routing) -> Tensor:
    """(T,) the probability of the chosen experts together, by the softmax over all (RMoE, arXiv 2408.06793)."""
    return (routing.logits.softmax(dim=-1) * routing.chosen_mask()).sum(dim=-1)


def margin(routing: Routing) -> Tensor:
    """(T,) the least logit that was chosen less the largest that was not; 0 where there is no such pair.

    By how much the chosen lie above the others in what the router itself makes of the token. Where not the logits
    alone choose (loss-free balancing adds a bias, stable and base choose in their own way), it is negative for tokens
    that go to other experts than those of their largest logits.
    """
    chosen = routing.chosen_mask()
    least = routing.logits.masked_fill(~chosen, math.inf).amin(dim=-1)
    largest = routing.logits.masked_fill(chosen, -math.inf).amax(dim=-1)
    return (least - largest).masked_fill(chosen.all(dim=-1) | ~chosen.any(dim=-1), 0.0)


def dropped(routing: Routing) -> Tensor:
    """(T,) how many of the token's assignments were not carried out."""
    if routing.kept is None:
        return routing.logits.new_zeros(len(routing.logits))
    not_kept = ~routing.kept if routing.chosen is None else routing.chosen & ~routing.kept
    return not_kept.sum(dim=-1).to(routing.logits)


def load_shares(load: Tensor) -> Tensor:
    """(..., E) share of the assignments that each expert has, of (..., E) tokens per expert; 0 without tokens."""
    return load / load.sum(dim=-1, keepdim=True).clamp(min=1)


def load_imbalance(load: Tensor) -> Tensor:
    """(...) load of the fullest expert over the mean, of (..., E) tokens per expert; 1 when even, 0 without tokens."""
    return load_shares(load).amax(dim=-1) * load.size(-1)


def load_cv(load: Tensor) -> Tensor:
    """(...) coefficient of variation, standard deviation over mean, of (..., E) tokens per expert; 0 when even."""
    return load_shares(load).std(dim=-1, unbiased=False) * load.size(-1)
