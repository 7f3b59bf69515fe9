"""The processes that train or evaluate together."""

from contextlib import contextmanager
from typing import Iterator

import torch.distributed as dist

from .errors import UserError


def number_of_workers() -> int:
    """How many there are."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


@contextmanager
def gives_up_without_memory(divides_experts: bool) -> Iterator[None]:
    """With *divides_experts*, raise a UserError where memory runs out inside the ``with`` block.

    Stock fairseq leaves the batch out and goes on, while the other workers wait for the tokens of this one.
    """
    try:
        yield
    except RuntimeError as error:
        if not (divides_experts and "out of memory" in str(error)):
            raise
        first = str(error).splitlines()[0]
        raise UserError(f"--batch-size or --max-tokens: a worker is out of memory, give less ({first})") from error
