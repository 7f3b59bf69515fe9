"""The processes that train or evaluate together."""

from typing import Optional

import torch.distributed as dist

from .errors import UserError


def number_of_workers() -> int:
    """How many there are."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def give_up_without_memory(error: Optional[BaseException]) -> None:
    """Raise a UserError where *error* says that memory ran out; for workers that wait for each other's tokens.

    Stock fairseq leaves the batch out and goes on, with a worker that the others then never hear of again.
    """
    if isinstance(error, RuntimeError) and "out of memory" in str(error):
        first = str(error).splitlines()[0]
        raise UserError(f"--batch-size or --max-tokens: a worker is out of memory, give less ({first})") from error
