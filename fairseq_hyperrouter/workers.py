"""The processes that train or evaluate together."""

import torch.distributed as dist


def number_of_workers() -> int:
    """How many there are."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1
