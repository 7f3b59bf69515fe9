"""What the equations say, in float64, one token and one expert after the other: slow, and nothing of the package.

Everything is differentiable. ``state`` is the state dict of a MoELayer as float64 tensors.
"""

import math
from fractions import Fraction
from typing import NamedTuple

import torch


class Reference(NamedTuple):
    y: torch.Tensor  # (T, D)
    logits: torch.Tensor  # (T, E)
    chosen: list  # T lists of K experts, best first
    gates: list  # T lists of K gates
    kept: list  # T lists of K bools


def float64_state(module):
    """The state dict of *module* as independent float64 leaves that collect gradients."""
    return {name: t.detach().double().clone().requires_grad_() for name, t in module.state_dict().items()}


def linear_weights(state, num_experts):
    return state["router.weight"], state["router.bias"]


def generated_weights(state, num_experts):
    """[W, b] = reshape(W2 relu(W1 e + b1) + b2, (E, D + 1)), times the constant scale."""
    weight1, bias1, weight2, bias2 = (
        state[f"router.hypernetwork.{n}"] for n in ("weight1", "bias1", "weight2", "bias2")
    )
    hidden = (weight1 @ state["router.embedding"] + bias1).clamp(min=0)
    rows = [state["router.scale"] * row for row in (weight2 @ hidden + bias2).chunk(num_experts)]
    return torch.stack([row[:-1] for row in rows]), torch.stack([row[-1] for row in rows])


ROUTER_WEIGHTS = {"smoe": linear_weights, "smoe-dropout": linear_weights, "hyperrouter": generated_weights}


def softmax(values):
    exponents = [(value - max(values).detach()).exp() for value in values]
    return [e / sum(exponents) for e in exponents]


def select(z, top_k, gate_softmax):
    """The experts of one token with logits *z* (E,), best first, and their gates."""
    chosen = sorted(range(len(z)), key=lambda i: -z[i].item())[:top_k]
    if gate_softmax == "selected":
        return chosen, softmax([z[i] for i in chosen])
    probability = softmax(list(z))
    return chosen, [probability[i] for i in chosen]


def limit_capacity(chosen, num_experts, factor, padded):
    """Which assignments fit: tokens in order, their best expert first, C places at every expert."""
    assignments = sum(len(experts) for experts, is_padding in zip(chosen, padded) if not is_padding)
    capacity = math.inf if factor is None else math.ceil(Fraction(factor) * assignments / num_experts)
    taken = [0] * num_experts
    kept = []
    for experts, is_padding in zip(chosen, padded):
        kept.append([])
        for expert in experts:
            fits = not is_padding and taken[expert] < capacity
            taken[expert] += fits
            kept[-1].append(fits)
    return kept


def feed_forward(x, weight1, bias1, weight2, bias2):
    return (x @ weight1 + bias1).clamp(min=0) @ weight2 + bias2


def moe_layer(state, x, *, router, top_k, gate_softmax="selected", padding=None, capacity_factor=None):
    """The layer on tokens x (T, D); *padding* (T,) bool."""
    experts = [state[f"experts.{name}"] for name in ("weight1", "bias1", "weight2", "bias2")]
    num_experts = len(experts[0])
    weight, bias = ROUTER_WEIGHTS[router](state, num_experts)
    padded = [False] * len(x) if padding is None else padding.tolist()

    z = [torch.stack([weight[i] @ token + bias[i] for i in range(num_experts)]) for token in x]
    chosen, gates = zip(*(select(row, top_k, gate_softmax) for row in z))
    kept = limit_capacity(chosen, num_experts, capacity_factor, padded)
    y = []
    for token, *row in zip(x, chosen, gates, kept):
        out = torch.zeros_like(token)
        for expert, gate, is_kept in zip(*row):
            if is_kept:
                out = out + gate * feed_forward(token, *(w[expert] for w in experts))
        if "shared_experts.fc1.weight" in state:
            fc1, fc2 = ((state[f"shared_experts.{fc}.weight"].t(), state[f"shared_experts.{fc}.bias"]) for fc in _FC)
            out = out + feed_forward(token, *fc1, *fc2)
        y.append(out)
    return Reference(torch.stack(y), torch.stack(z), list(chosen), list(gates), kept)


_FC = ("fc1", "fc2")


def counted(logits, chosen, padding):
    """(softmax(z) as a list, z, chosen experts) of each token that is not padding."""
    padded = [False] * len(logits) if padding is None else padding.tolist()
    return [(softmax(list(z)), z, c) for z, c, p in zip(logits, chosen, padded) if not p]


def balance_loss(logits, chosen, padding=None):
    """E sum_i f_i P_i."""
    tokens = counted(logits, chosen, padding)
    total = 0.0
    for i in range(logits.size(1)):
        f = sum(list(c).count(i) for _, _, c in tokens) / sum(len(c) for _, _, c in tokens)
        total = total + f * sum(p[i] for p, _, _ in tokens) / len(tokens)
    return logits.size(1) * total


def z_loss(logits, chosen, padding=None):
    """mean (log sum_i exp z_i)^2."""
    tokens = counted(logits, chosen, padding)
    return sum(sum(v.exp() for v in z).log() ** 2 for _, z, _ in tokens) / len(tokens)


def entropy(logits, chosen, padding=None):
    """Mean over tokens of - sum_i p_i ln p_i."""
    tokens = counted(logits, chosen, padding)
    return sum(-sum(p * p.log() for p in probability) for probability, _, _ in tokens) / len(tokens)


def inner_balance(logits, chosen, padding=None):
    """Geometric mean over tokens of the probability of the best expert over the second's."""
    tokens = counted(logits, chosen, padding)
    best = [sorted((p.item() for p in probability), reverse=True) for probability, _, _ in tokens]
    return math.prod(p[0] / p[1] for p in best) ** (1 / len(best))


def outer_balance(logits, chosen, padding=None):
    """Mean over tokens of the probability of the chosen experts together."""
    tokens = counted(logits, chosen, padding)
    return sum(sum(probability[i] for i in c) for probability, _, c in tokens) / len(tokens)


def margin(logits, chosen, padding=None):
    """Mean over tokens of the least logit that was chosen less the largest that was not; 0 where there is none."""
    tokens = counted(logits, chosen, padding)
    total = 0.0
    for _, z, c in tokens:
        others = set(range(len(z))) - set(c)
        total += min(z[i] for i in c) - max(z[i] for i in others) if c and others else 0.0
    return total / len(tokens)


def loads(logits, chosen, padding=None):
    """Tokens per expert."""
    tokens = counted(logits, chosen, padding)
    return [sum(list(c).count(i) for _, _, c in tokens) for i in range(logits.size(1))]


def load_share(expert, *routing):
    """Share of the assignments that one expert has."""
    load = loads(*routing)
    return load[expert] / sum(load)


def load_cv(*routing):
    """Standard deviation over mean of the tokens per expert."""
    load = loads(*routing)
    mean = sum(load) / len(load)
    return math.sqrt(sum((n - mean) ** 2 for n in load) / len(load)) / mean


def normalised_entropy(logits, *chosen):
    """Entropy over ln E."""
    return entropy(logits, *chosen) / math.log(logits.size(1))


def of_layers(function, routings, padding):
    """*function*, one of those above, of each of a model's Routings."""
    values = []
    for routing in routings:
        is_chosen = torch.ones_like(routing.expert_index) if routing.chosen is None else routing.chosen
        rows = zip(routing.expert_index.tolist(), is_chosen.tolist())
        chosen = [[expert for expert, has in zip(*row) if has] for row in rows]
        values.append(float(function(routing.logits.detach().double(), chosen, padding)))
    return values
