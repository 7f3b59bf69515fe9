"""What is logged of a model's Routings, for any criterion.

Dimensions: L MoE layers, T tokens, E experts.
"""

from typing import Any, Callable, Dict, List, Optional, Sequence

import torch
from fairseq.logging import metrics
from torch import Tensor

from fairseq_hyperrouter.routing import Routing, losses, totals
from fairseq_hyperrouter.routing import metrics as of_routing

Routings = Sequence[Optional[Routing]]


def _total(per_token: Callable[[Routing], Tensor]) -> Callable[[Routing], Tensor]:
    return lambda routing: totals.sum_over_tokens(routing, per_token(routing))


_SUMS = {
    "moe_tokens": totals.num_tokens,
    "moe_load": totals.expert_load,
    "moe_probability": totals.probability_sum,
    "moe_entropy": _total(of_routing.entropy),
    "moe_dropped": _total(of_routing.dropped),
}
_SUMS_PER_LAYER = {
    "moe_inner_balance": _total(of_routing.log_inner_balance),
    "moe_outer_balance": _total(of_routing.outer_balance),
    "moe_margin": _total(of_routing.margin),
}


@torch.no_grad()
def routing_sums(routings: Routings, num_experts: int, device: torch.device, per_layer: bool = False) -> Dict[str, Any]:
    """Sums over tokens, one row per MoE layer, to be added over micro-batches and workers.

    A layer that LayerDrop left out has a row of zeros: workers add up tensors of the same shapes only.

    Args:
        per_layer: with what is logged of every layer alone.
    """
    nothing = Routing(
        torch.zeros(0, num_experts, device=device),
        torch.zeros(0, 1, dtype=torch.long, device=device),
        torch.zeros(0, 1, device=device),
    )
    sums = {
        name: torch.stack([total(nothing if routing is None else routing) for routing in routings])
        for name, total in {**_SUMS, **(_SUMS_PER_LAYER if per_layer else {})}.items()
    }
    return {**sums, "n_moe_layers": sum(routing is not None for routing in routings)}


def log_routing(logging_outputs: List[Dict[str, Any]]) -> None:
    """Log the metrics of the whole batch, over all workers, as means over the MoE layers.

    moe_top_k           experts per token in force
    moe_balance_loss    E sum_i f_i P_i, 1 when even
    moe_router_entropy  of the softmax over all experts, nats; ln E when the router is undecided
    moe_load_imbalance  load of the fullest expert over the mean load; 1 when even
    moe_unused_experts  experts that no token chose
    moe_dropped         share of the assignments that were over a capacity

    With ``--moe-log-layers`` each of every layer too, moe_router_entropy_layer0 for the first, and

    moe_normalised_entropy_layer0  router entropy over ln E
    moe_load_expert0_layer0        share of the layer's assignments that the first expert has; 1 / E when even
    moe_load_cv_layer0             standard deviation of the experts' loads over their mean; 0 when even
    moe_inner_balance_layer0       probability of a token's best expert over the second's, geometric mean
    moe_outer_balance_layer0       probability of a token's chosen experts together
    moe_margin_layer0              by how much the logits of a token's chosen experts are above those of the others
    """
    outputs = [output for output in logging_outputs if "moe_load" in output]
    weight = sum(output["n_moe_layers"] for output in outputs)
    if not weight:  # nothing to log: no MoE layer, or LayerDrop left all of them out
        return
    names = {**_SUMS, **_SUMS_PER_LAYER} if "moe_margin" in outputs[0] else _SUMS
    sums = {name: torch.as_tensor(sum(output[name] for output in outputs)) for name in names}
    tokens, load = sums["moe_tokens"], sums["moe_load"]
    ran = tokens > 0  # (L,)
    num_layers = ran.sum().clamp(min=1)
    assignments = load.sum(dim=-1)
    entropy = sums["moe_entropy"] / tokens
    per_layer = {
        "moe_top_k": (assignments / tokens, 2),
        "moe_balance_loss": (losses.balance(load, sums["moe_probability"]), 3),
        "moe_router_entropy": (entropy, 3),
        "moe_load_imbalance": (of_routing.load_imbalance(load), 2),
        "moe_unused_experts": ((load == 0).sum(dim=-1).to(load), 2),
        "moe_dropped": (sums["moe_dropped"] / assignments.clamp(min=1), 4),
    }
    for name, (values, digits) in per_layer.items():
        mean = values.masked_fill(~ran, 0.0).sum() / num_layers
        metrics.log_scalar(name, mean, weight=weight, priority=600, round=digits)
    if names is _SUMS:
        return
    per_layer["moe_normalised_entropy"] = (entropy / of_routing.largest_entropy(load.size(-1)), 3)
    for expert, share in enumerate(of_routing.load_shares(load).t()):
        per_layer[f"moe_load_expert{expert}"] = (share, 4)
    per_layer["moe_load_cv"] = (of_routing.load_cv(load), 3)
    per_layer["moe_inner_balance"] = ((sums["moe_inner_balance"] / tokens).exp(), 3)
    per_layer["moe_outer_balance"] = (sums["moe_outer_balance"] / tokens, 3)
    per_layer["moe_margin"] = (sums["moe_margin"] / tokens, 3)
    numbers = torch.stack([ran.to(load), *(values for values, _ in per_layer.values())]).tolist()  # one copy from a GPU
    for (name, (_, digits)), values in zip(per_layer.items(), numbers[1:]):
        for layer, (value, is_there) in enumerate(zip(values, numbers[0])):
            if is_there:
                metrics.log_scalar(f"{name}_layer{layer}", value, weight=weight, priority=700, round=digits)
