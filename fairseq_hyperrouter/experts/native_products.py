"""The products of ``run_products.py`` in C code of ours, and where to use them."""

from typing import Optional

import torch
from torch import Tensor

from fairseq_hyperrouter.native import run_products as native

from .derivatives import may_use_addresses
from .run_products import Rows, TorchProducts
from .weights import product_dtype


class NativeProducts(TorchProducts):
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


def has_native() -> bool:
    """Whether the C code was compiled and this processor can run it."""
    return native is not None


def torch_keeps_to_avx2() -> bool:
    """Whether torch's products, MKL's, leave AVX-512 units unused that ours use: those of AMD's."""
    return native is not None and bool(native.amd)


def serves_inference(*tensors: Tensor) -> bool:
    """Whether C code of ours can compute with *tensors* where no derivative is asked for."""
    return native is not None and may_use_addresses(*tensors) and product_dtype(tensors[0]) == torch.float32


def _address(tensor: Optional[Tensor]) -> int:
    return 0 if tensor is None else tensor.data_ptr()
