"""A look inside a model while it is evaluated."""

from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any, Callable, Dict, Iterator, Sequence, Tuple

from torch import Tensor

from fairseq_hyperrouter.moe_layer import MoELayer
from fairseq_hyperrouter.routing import Routing

Observe = Callable[[int, Tensor, Dict[str, Any], Routing], None]


@contextmanager
def observed(layers: Sequence[MoELayer], observe: Observe) -> Iterator[None]:
    """Inside the ``with`` block tell *observe* of every forward pass of the MoE layers.

    Args:
        observe: (which of the layers, its input (..., D), the other arguments by name, what it routed) -> None
    """

    def tell(number: int, _: MoELayer, args: Tuple[Tensor], kwargs: Dict[str, Any], output: Tuple[Any, Any]) -> None:
        observe(number, args[0], kwargs, output[1])

    with ExitStack() as hooks:
        for number, layer in enumerate(layers):
            hooks.enter_context(layer.register_forward_hook(partial(tell, number), with_kwargs=True))
        yield
