"""In which dtype something is computed."""

import torch
from torch import Tensor


def product_dtype(x: Tensor) -> torch.dtype:
    """In which a product with *x* is computed: with autocast another than that of *x*. An empty product tells."""
    return torch.mm(x.new_empty(0, 0), x.new_empty(0, 0)).dtype


def sum_dtype(x: Tensor) -> torch.dtype:
    """In which a token's expert outputs are added up: float32 where they are shorter, whatever k is."""
    return torch.promote_types(x.dtype, torch.float32)
