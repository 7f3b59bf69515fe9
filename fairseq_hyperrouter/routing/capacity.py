"""A limit on how many tokens an expert takes (GShard, arXiv 2006.16668; Switch, arXiv 2101.03961).

Dimensions: T tokens, E experts, K experts per token, N = T K assignments.
"""

import torch

from .routing import Routing


def limit_capacity(routing: Routing, capacity_factor: float) -> Routing:
    """Drop the assignments beyond what each expert may take.

    1. Capacity C = ceil(capacity_factor * N / E), the same for every expert, N the assignments that would be carried
       out: K for every token but padding, and fewer where tokens have fewer than K experts.
    2. Assignments queue at their expert in the order of the tokens, first choices and later ones alike.
       With time-major tokens no token can push out an earlier one, so a causal decoder stays causal.
    3. Those after the first C are not carried out: their entry in ``kept`` is False, the gates of the
       rest are not renormalised, and the dropped token passes through the residual connection only.

    Nothing is copied to the host.
    """
    num_experts = routing.logits.size(1)
    expert_index_N = routing.expert_index.reshape(-1)
    num_assignments = expert_index_N.numel()
    if routing.kept is not None:  # padding waits at no expert
        expert_index_N = expert_index_N.masked_fill(~routing.kept.reshape(-1), num_experts)
        valid = routing.kept.sum()
    else:
        valid = torch.full((), num_assignments, device=expert_index_N.device)
    # A little less, or 1.1 * 50 / 5 in binary would round up to 12.
    capacity = torch.ceil(capacity_factor * valid.double() / num_experts * (1 - 1e-9))

    queued, order = expert_index_N.sort(stable=True)
    queue_start = torch.searchsorted(queued, torch.arange(num_experts + 1, device=queued.device))
    place = torch.arange(num_assignments, device=queued.device) - queue_start[queued]
    kept_N = torch.empty_like(queued, dtype=torch.bool)
    kept_N[order] = (place < capacity) & (queued < num_experts)
    return routing._replace(kept=kept_N.view_as(routing.expert_index))
