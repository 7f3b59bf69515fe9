"""The numbers of every MoE layer as a table, and what each of them means."""

from typing import Any, Dict, List

NUMBERS = (  # name in an Inspection, title, meaning
    ("router_entropy", "router entropy, nats", "of the softmax over all experts; ln E when undecided"),
    ("normalised_entropy", "entropy / ln E", ""),
    ("inner_balance", "p1 / p2", "probability of the best expert over the second's, geometric mean"),
    ("outer_balance", "mass of the chosen", "probability of the chosen experts together"),
    ("margin", "margin", "how much the logits of the chosen experts are above those of the others"),
    (
        "load_imbalance",
        "load imbalance",
        "of the fullest expert over the mean; 1 when even (MaxVio, the maximal violation, is 1 less)",
    ),
    ("load_cv", "load CV", "standard deviation over mean of the tokens per expert; 0 when even"),
    ("unused_experts", "unused", "experts that no token has"),
    (
        "mean_output_similarity",
        "output CKA",
        "of two experts' outputs, unbiased: 1 when equal but for rotation, scale and shift, about 0 when unrelated; "
        "mean over pairs",
    ),
    ("mean_weight_similarity", "weight cosine", "of two experts' weights, mean over pairs"),
    ("hidden_rank", "rank of inputs", "effective rank of the router's input; at most its width, and the sample"),
    ("jacobian_rank", "rank of J's routing term", "at one token, mean"),
    (
        "jacobian_span",
        "span over tokens",
        "of the routing terms of all tokens looked at; at most E for a linear router",
    ),
)


def layer_rows(checkpoint: Dict[str, Any]) -> List[List[str]]:
    """A row for each of NUMBERS, with a column per layer; the first row is the head."""
    head = ["layer", *(str(number) for number in range(len(checkpoint["layers"])))]
    return [head, *([title, *(_cell(layer[name]) for layer in checkpoint["layers"])] for name, title, _ in NUMBERS)]


def _cell(value: Any) -> str:
    if value is None:
        return ""
    return str(value) if isinstance(value, int) else f"{value:.3g}"
