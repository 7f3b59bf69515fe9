"""The processes that train or evaluate together."""

from contextlib import contextmanager
from typing import Iterator

import torch.distributed as dist

from .errors import UserError


def number_of_workers() -> int:
    """How many there are."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


@contextmanager
def gives_up_without_memory(others_wait: bool) -> Iterator[None]:
    """Where *others_wait* for what this worker has of a batch, raise a UserError if memory runs out inside the block.

    Stock fairseq leaves the batch out (in training) or tries it again (in validation). Workers that wait for tokens of
    their experts, loads or gradients then hang, or end in the communication library.
    """
    try:
        yield
    except RuntimeError as error:
        if not (others_wait and "out of memory" in str(error)):
            raise
        first = str(error).splitlines()[0]
        raise UserError(f"--batch-size or --max-tokens: a worker is out of memory, give less ({first})") from error
