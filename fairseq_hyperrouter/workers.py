"""The processes that train or evaluate together."""

from contextlib import contextmanager
from typing import Iterator

import torch.distributed as dist

from .errors import UserError


def number_of_workers() -> int:
    """How many there are."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


@contextmanager
def gives_up_without_memory() -> Iterator[None]:
    """One of several workers raises a UserError where memory runs out inside the ``with`` block.

    Stock fairseq leaves the batch out, but the other workers wait for what this one has of it: tokens of their experts,
    loads, gradients. It then hangs, or ends in the communication library.
    """
    try:
        yield
    except RuntimeError as error:
        if number_of_workers() == 1 or "out of memory" not in str(error):
            raise
        first = str(error).splitlines()[0]
        raise UserError(f"--batch-size or --max-tokens: a worker is out of memory, give less ({first})") from error
