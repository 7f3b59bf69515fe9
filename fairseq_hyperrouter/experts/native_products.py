"""The products of ``run_products.py`` in C code of ours."""

from typing import Optional

import torch
from torch import Tensor

from fairseq_hyperrouter.native import run_products as native

from .run_products import Rows, RunProducts


class NativeRunProducts(RunProducts):
    """With C code of ours (run_products.c), in float32: gathering, gates and sums happen on a product's way."""

    @staticmethod
    def used_twice(rows: Rows) -> Rows:
        return rows

    @staticmethod
    def rows(rows: Rows, weight: Tensor, bias: Optional[Tensor] = None, *, transposed: bool = False) -> Tensor:
        width = weight.size(0 if transposed else 1)
        out = weight.new_empty(rows.n, width)
        sizes = rows.n, rows.a.size(1), width, torch.get_num_threads()
        where = map(_address, (rows.a, rows.token, weight))
        native.rows(*where, transposed, _address(bias), _address(out), *sizes)
        return out

    @classmethod
    def add_rows(
        cls,
        y: Tensor,
        token: Tensor,
        a: Tensor,
        weight: Tensor,
        bias: Optional[Tensor] = None,
        gate: Optional[Tensor] = None,
        *,
        transposed: bool = False,
    ) -> None:
        places = map(_address, (bias, gate, token, y))
        native.add_rows(
            _address(a), _address(weight), transposed, *places, *a.shape, y.size(1), torch.get_num_threads()
        )

    @staticmethod
    def weight(a: Rows, b: Rows, gate: Optional[Tensor], dweight: Tensor, dbias: Tensor) -> None:
        places = map(_address, (a.a, a.token, b.a, b.token, gate, dweight, dbias))
        native.weight(*places, a.n, *dweight.shape, torch.get_num_threads())

    @staticmethod
    def gates(dhidden: Tensor, activated: Tensor, dy: Rows, bias: Tensor, gate: Tensor, dgate: Tensor) -> None:
        places = map(_address, (dhidden, activated, dy.a, dy.token, bias, gate, dgate))
        native.gates(*places, *dhidden.shape, dy.a.size(1), torch.get_num_threads())


def _address(tensor: Optional[Tensor]) -> int:
    return 0 if tensor is None else tensor.data_ptr()
