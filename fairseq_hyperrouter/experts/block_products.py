"""Products of sorted rows in blocks, each of one expert: torch's batched ones.

Dimensions: N rows, E experts, I and O the sizes of a weight.
"""

import torch
from torch import Tensor

from .dispatch import Dispatch
from .grouped_products import Products

BLOCK_ROWS = 128


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
