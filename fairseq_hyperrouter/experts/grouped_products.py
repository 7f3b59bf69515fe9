"""Products of sorted rows with the weights of their experts, without a look at how many rows each expert has.

Dimensions: N rows, E experts, I and O the sizes of a weight.
"""

from abc import ABC, abstractmethod
from typing import Optional

import torch
import torch.nn.functional as F
from torch import Tensor

from .dispatch import Dispatch
from .weights import sum_dtype

BLOCK_ROWS = 128


class Products(ABC):
    """What the backends for GPUs multiply with. Rows that are not carried out give 0 and are not looked at."""

    def __init__(self, dispatch: Dispatch) -> None:
        self.num_experts = dispatch.ends.numel()
        self.experts = torch.arange(self.num_experts, device=dispatch.ends.device)
        self.expert = dispatch.expert
        self.skipped: Optional[Tensor] = None
        """(N, 1) bool, True for rows not carried out; None when there are none."""
        if not dispatch.is_whole:
            self.skipped = (dispatch.expert == self.num_experts)[:, None]

    @abstractmethod
    def rows(self, a: Tensor, weight: Tensor) -> Tensor:
        """a (N, I) and weight (E, I, O) -> (N, O): each row times the weight of its expert."""

    @abstractmethod
    def weights(self, a: Tensor, b: Tensor) -> Tensor:
        """a (N, I) and b (N, O) -> (E, I, O): for each expert, its rows of a, transposed, times those of b."""

    def sums(self, a: Tensor) -> Tensor:
        """a (N, O) -> (E, O): for each expert, the sum of its rows.

        On a GPU a product, since atomic sums differ run by run.
        """
        if a.device.type == "cpu":
            sums = a.new_zeros(self.num_experts + 1, a.size(1), dtype=sum_dtype(a))
            return sums.index_add_(0, self.expert, a.to(sums.dtype))[:-1].to(a.dtype)
        return (self.experts[:, None] == self.expert).to(a.dtype) @ a

    def _cleaned(self, product: Tensor) -> Tensor:
        return product if self.skipped is None else product.masked_fill_(self.skipped, 0)


class GroupedProducts(Products):
    """``torch.nn.functional.grouped_mm``; rows after the last expert's it leaves as they were in memory."""

    def __init__(self, dispatch: Dispatch) -> None:
        super().__init__(dispatch)
        self.offs = dispatch.ends.int()

    def rows(self, a: Tensor, weight: Tensor) -> Tensor:
        return self._cleaned(F.grouped_mm(a, weight, offs=self.offs))

    def weights(self, a: Tensor, b: Tensor) -> Tensor:
        return F.grouped_mm(a.t(), b, offs=self.offs)


class Tiles:
    """The rows of every expert, cut into tiles of *size* rows; each expert's last one may have fewer.

    N // size + E tiles are enough however the rows are divided, so no count has to be known on the host.
    """

    def __init__(self, dispatch: Dispatch, size: int) -> None:
        E = dispatch.ends.numel()
        rows = dispatch.ends.diff(prepend=dispatch.ends.new_zeros(1))
        self.number = dispatch.order.numel() // size + E
        self.of_expert = (rows + size - 1).div(size, rounding_mode="floor")
        """(E,) how many each has."""
        after = self.of_expert.cumsum(0)
        tiles = torch.arange(self.number, device=rows.device)
        self.expert = torch.searchsorted(after, tiles, right=True).clamp_(max=E - 1)
        """(number,) whose it is."""
        self.shift = (after - self.of_expert) * size - (dispatch.ends - rows)
        """(E,) of a row's place to where it would stand if all tiles were full."""
        self.start = tiles * size - self.shift.index_select(0, self.expert)
        """(number,) the place of its first row; of tiles that are left over, after the last expert's rows."""


class BlockProducts(Products):
    """Batched products of tiles of rows, each expert's last one filled up with zeros."""

    def __init__(self, dispatch: Dispatch) -> None:
        super().__init__(dispatch)
        self.tiles = Tiles(dispatch, BLOCK_ROWS)
        # rows not carried out share one place after all tiles
        shift = torch.cat([self.tiles.shift, self.tiles.shift.new_zeros(1)])
        self.slot = torch.arange(dispatch.order.numel(), device=shift.device) + shift.index_select(0, dispatch.expert)
        if self.skipped is not None:
            self.slot.masked_fill_(self.skipped[:, 0], self.tiles.number * BLOCK_ROWS)

    def _blocks(self, a: Tensor) -> Tensor:
        """(N, I) -> (tiles, BLOCK_ROWS, I)"""
        filled = a.new_zeros(self.tiles.number * BLOCK_ROWS + 1, a.size(1)).index_copy_(0, self.slot, a)
        return filled[:-1].view(self.tiles.number, BLOCK_ROWS, -1)

    def rows(self, a: Tensor, weight: Tensor) -> Tensor:
        product = torch.bmm(self._blocks(a), weight.index_select(0, self.tiles.expert)).flatten(0, 1)
        slot = self.slot if self.skipped is None else self.slot.clamp(max=len(product) - 1)
        return self._cleaned(product.index_select(0, slot))

    def weights(self, a: Tensor, b: Tensor) -> Tensor:
        of_tiles = torch.bmm(self._blocks(a).transpose(1, 2), self._blocks(b))
        return torch.segment_reduce(of_tiles, "sum", lengths=self.tiles.of_expert, axis=0, unsafe=True, initial=0)
