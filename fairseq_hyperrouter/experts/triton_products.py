"""Products of sorted rows with the weights of their experts as Triton kernels.

Dimensions: N rows, E experts, I inputs and O outputs of a weight.

Every program computes one tile of the result. Which rows it belongs to is read on the GPU, from tables that the
``Tiles`` of a dispatch hold: no count has to be known on the host, and no row is copied or filled up. Sums are made in
float32, in an order that stays the same in a process (Triton measures, in each, which tiles are fastest).
"""

import os
from typing import Any, List

import torch
import triton
import triton.language as tl
from torch import Tensor

from .block_products import Tiles
from .dispatch import Dispatch
from .grouped_products import Products

ROWS = 64
"""Of a tile. With more, an expert's last tile is emptier; with fewer, weights are read more often."""


INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
"""Whether Triton's interpreter runs the kernels, on a CPU."""


def _configurations() -> List[triton.Config]:
    """Between which Triton chooses by measuring, once for every size of weight."""
    sizes = [(64, 32, 4, 4), (128, 32, 4, 4), (128, 64, 4, 3), (128, 64, 8, 3), (256, 64, 8, 3), (64, 64, 4, 3)]
    if INTERPRETED:
        sizes = sizes[:1]
    return [
        triton.Config({"COLUMNS": columns, "INNER": inner}, num_warps=warps, num_stages=stages)
        for columns, inner, warps, stages in sizes
    ]


@triton.autotune(_configurations(), key=["inputs", "outputs", "of_columns"])
@triton.jit
def _rows(
    a, weight, result, tile_expert, tile_start, tile_end, inputs, outputs,
    of_expert, of_rows, of_columns,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, INNER: tl.constexpr, PRECISION: tl.constexpr,
) -> None:  # fmt: skip
    """result (N, O): ROWS rows of a (N, I) times COLUMNS columns of their expert's weight, whose strides are given."""
    tile = tl.program_id(1)
    start, end = tl.load(tile_start + tile), tl.load(tile_end + tile)
    if start < end:
        row = start + tl.arange(0, ROWS)
        column = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
        own_weight = weight + tl.load(tile_expert + tile) * of_expert
        total = tl.zeros((ROWS, COLUMNS), tl.float32)
        for first in range(0, inputs, INNER):
            inner = first + tl.arange(0, INNER)
            mask = (row[:, None] < end) & (inner[None, :] < inputs)
            part_a = tl.load(a + row[:, None] * inputs + inner[None, :], mask=mask, other=0.0)
            mask = (inner[:, None] < inputs) & (column[None, :] < outputs)
            place = inner[:, None] * of_rows + column[None, :] * of_columns
            part_weight = tl.load(own_weight + place, mask=mask, other=0.0)
            total = tl.dot(part_a, part_weight, total, input_precision=PRECISION)
        mask = (row[:, None] < end) & (column[None, :] < outputs)
        tl.store(result + row[:, None] * outputs + column[None, :], total.to(result.dtype.element_ty), mask=mask)


@triton.autotune(_configurations(), key=["inputs", "outputs"])
@triton.jit
def _weights(
    a, b, result, starts, ends, inputs, outputs,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, INNER: tl.constexpr, PRECISION: tl.constexpr,
) -> None:  # fmt: skip
    """result (E, I, O): ROWS x COLUMNS of one expert's sum over its rows of a (N, I), transposed, times b (N, O)."""
    expert = tl.program_id(2).to(tl.int64)
    i = tl.program_id(1) * ROWS + tl.arange(0, ROWS)
    o = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    start, end = tl.load(starts + expert), tl.load(ends + expert)
    total = tl.zeros((ROWS, COLUMNS), tl.float32)
    for first in range(start, end, INNER):
        row = first + tl.arange(0, INNER)
        mask = (row[None, :] < end) & (i[:, None] < inputs)
        part_a = tl.load(a + row[None, :] * inputs + i[:, None], mask=mask, other=0.0)
        mask = (row[:, None] < end) & (o[None, :] < outputs)
        part_b = tl.load(b + row[:, None] * outputs + o[None, :], mask=mask, other=0.0)
        total = tl.dot(part_a, part_b, total, input_precision=PRECISION)
    place = (expert * inputs + i[:, None]) * outputs + o[None, :]
    tl.store(result + place, total.to(result.dtype.element_ty), mask=(i[:, None] < inputs) & (o[None, :] < outputs))


class TritonProducts(Products):
    """One kernel for products with weights and one for gradients of weights."""

    def __init__(self, dispatch: Dispatch) -> None:
        super().__init__(dispatch)
        self.ends = dispatch.ends
        self.starts = torch.cat([dispatch.ends.new_zeros(1), dispatch.ends[:-1]])
        self.tiles = Tiles(dispatch, ROWS)
        self.tile_end = self.ends.index_select(0, self.tiles.expert)

    def rows(self, a: Tensor, weight: Tensor) -> Tensor:
        a, (_, inputs, outputs) = a.contiguous(), weight.shape
        result = a.new_empty(len(a), outputs)
        tensors = a, weight, result, self.tiles.expert, self.tiles.start, self.tile_end

        def programs(chosen: Any) -> Any:
            return triton.cdiv(outputs, chosen["COLUMNS"]), self.tiles.number

        with torch.cuda.device_of(a):
            _rows[programs](*tensors, inputs, outputs, *weight.stride(), ROWS=ROWS, PRECISION=_precision())
        return self._cleaned(result)

    def weights(self, a: Tensor, b: Tensor) -> Tensor:
        a, b, inputs, outputs = a.contiguous(), b.contiguous(), a.size(1), b.size(1)
        result = a.new_empty(self.num_experts, inputs, outputs)

        def programs(chosen: Any) -> Any:
            return triton.cdiv(outputs, chosen["COLUMNS"]), triton.cdiv(inputs, ROWS), self.num_experts

        with torch.cuda.device_of(a):
            _weights[programs](a, b, result, self.starts, self.ends, inputs, outputs, ROWS=ROWS, PRECISION=_precision())
        return result


def _precision() -> str:
    """Of float32, as torch's own products are set."""
    return "tf32" if torch.backends.cuda.matmul.allow_tf32 else "ieee"
