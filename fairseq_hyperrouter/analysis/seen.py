"""What a MoE layer made of tokens, kept for later.

Dimensions: T tokens, D model.
"""

from typing import Any, Dict, Iterable, NamedTuple, Optional, Sequence, Union

import torch
from torch import Tensor

from fairseq_hyperrouter.routing import Routing


class Seen(NamedTuple):
    """What one MoE layer made of tokens."""

    number: Tensor
    """(T,) where in the text each stands."""
    x: Tensor
    """(T, D)"""
    routing: Routing
    token_ids: Tensor
    """(T,)"""
    state: Optional[Tensor]
    """(T, S), what the router of the layer below handed on."""


def seen_tokens(number: Tensor, x: Tensor, arguments: Dict[str, Any], routing: Routing) -> Seen:
    """Of one forward pass, padding left out."""
    seen = Seen(
        number,
        x.flatten(0, -2),
        Routing(routing.logits, routing.expert_index, routing.gate, chosen=routing.chosen),
        arguments["token_ids"].reshape(-1),
        arguments.get("router_state"),
    )
    return seen if routing.token_mask is None else at(seen, routing.token_mask)


def at(seen: Seen, which: Union[Tensor, slice]) -> Seen:
    """Some of the tokens, or all in another order."""

    def picked(value: Optional[Tensor]) -> Optional[Tensor]:
        return None if value is None else value[which]

    return Seen(*(Routing(*map(picked, one)) if isinstance(one, Routing) else picked(one) for one in seen))


def together(parts: Sequence[Seen]) -> Seen:
    """In the order of the text."""

    def joined(values: Iterable[Optional[Tensor]]) -> Optional[Tensor]:
        values = [value for value in values if value is not None]
        return torch.cat(values) if values else None

    number, x, routings, token_ids, states = zip(*parts)
    whole = Seen(*map(joined, (number, x)), Routing(*map(joined, zip(*routings))), *map(joined, (token_ids, states)))
    return at(whole, whole.number.argsort())
