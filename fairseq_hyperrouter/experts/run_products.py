"""Products of one expert's rows, on a CPU, and what lies between them.

Dimensions: T tokens, n rows of the expert, I and O the sizes of a weight, D model, F hidden.
"""

from typing import Optional, Tuple

import torch
from torch import Tensor

from fairseq_hyperrouter.native import run_products as native

from .weights import has_tangents, product_dtype, sum_dtype, trains


class RunProducts:
    """With torch's operations."""

    @staticmethod
    def gathered(a: Tensor, token: Tensor) -> Tuple[Tensor, Optional[Tensor]]:
        """*a* and *token* as the methods below take them, where they are needed more than once."""
        return a.index_select(0, token), None

    @staticmethod
    def rows(
        a: Tensor,
        token: Optional[Tensor],
        weight: Tensor,
        bias: Optional[Tensor] = None,
        *,
        transposed: bool = False,
    ) -> Tensor:
        """a[token] weight + bias (n, O).

        Args:
            a: (T, I), or (n, I) without *token*.
            token: (n,) which row of *a*.
            weight: (I, O), or (O, I) if *transposed*.
        """
        a = a if token is None else a.index_select(0, token)
        weight = weight.t() if transposed else weight
        return torch.mm(a, weight) if bias is None else torch.addmm(bias, a, weight)

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
        """y[token] += gate (a weight + bias), with y (T, O), a (n, I), gate (n,)."""
        output = cls.rows(a, None, weight, bias, transposed=transposed).to(y.dtype)
        y.index_add_(0, token, output if gate is None else output.mul_(gate[:, None]))

    @staticmethod
    def weight(
        a: Tensor,
        a_token: Optional[Tensor],
        b: Tensor,
        b_token: Optional[Tensor],
        gate: Optional[Tensor],
        dweight: Tensor,
        dbias: Tensor,
    ) -> None:
        """dweight (I, O) = a[a_token] transposed times gate b[b_token]; dbias (O,) = the sum of the latter's rows."""
        a = a if a_token is None else a.index_select(0, a_token)
        b = b if b_token is None else b.index_select(0, b_token)
        b = b if gate is None else (b * gate[:, None]).to(b.dtype)
        torch.mm(a.t(), b, out=dweight)
        torch.sum(b, 0, out=dbias)

    @staticmethod
    def gates(
        dhidden: Tensor,
        activated: Tensor,
        dy: Tensor,
        token: Optional[Tensor],
        bias: Tensor,
        gate: Tensor,
        dgate: Tensor,
    ) -> None:
        """dgate (n,) = the gates' gradient, dhidden (n, F) . activated + dy[token] . bias; then dhidden *= gate."""
        dtype, dy = sum_dtype(dhidden), dy if token is None else dy.index_select(0, token)
        dgate.copy_(torch.linalg.vecdot(dhidden.to(dtype), activated.to(dtype)))
        dgate += dy @ bias
        dhidden.mul_(gate[:, None])


class NativeProducts(RunProducts):
    """With C code of ours (run_products.c), in float32: gathering, gates and sums happen on a product's way."""

    @staticmethod
    def gathered(a: Tensor, token: Tensor) -> Tuple[Tensor, Optional[Tensor]]:
        return a, token

    @staticmethod
    def rows(
        a: Tensor,
        token: Optional[Tensor],
        weight: Tensor,
        bias: Optional[Tensor] = None,
        *,
        transposed: bool = False,
    ) -> Tensor:
        n, width = len(a if token is None else token), weight.size(0 if transposed else 1)
        out = a.new_empty(n, width)
        sizes = n, a.size(1), width, torch.get_num_threads()
        native.rows(*map(_address, (a, token, weight)), transposed, *map(_address, (bias, out)), *sizes)
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
    def weight(
        a: Tensor,
        a_token: Optional[Tensor],
        b: Tensor,
        b_token: Optional[Tensor],
        gate: Optional[Tensor],
        dweight: Tensor,
        dbias: Tensor,
    ) -> None:
        places = map(_address, (a, a_token, b, b_token, gate, dweight, dbias))
        native.weight(*places, len(a if a_token is None else a_token), *dweight.shape, torch.get_num_threads())

    @staticmethod
    def gates(
        dhidden: Tensor,
        activated: Tensor,
        dy: Tensor,
        token: Optional[Tensor],
        bias: Tensor,
        gate: Tensor,
        dgate: Tensor,
    ) -> None:
        places = map(_address, (dhidden, activated, dy, token, bias, gate, dgate))
        native.gates(*places, *dhidden.shape, dy.size(1), torch.get_num_threads())


def has_native() -> bool:
    """Whether the C code was compiled and this processor can run it."""
    return native is not None


def native_is_faster() -> bool:
    """Whether it beats torch's products: where those are MKL's, which leave an AMD's AVX-512 units unused."""
    return native is not None and bool(native.amd)


def serves_inference(*tensors: Tensor) -> bool:
    """Whether C code of ours can compute with *tensors*, and is faster, where no derivative is asked for."""
    return (
        native_is_faster()
        and not torch.jit.is_tracing()
        and all(tensor.device.type == "cpu" and tensor.dtype == torch.float32 for tensor in tensors)
        and not trains(*tensors)
        and not has_tangents(*tensors)
        and product_dtype(tensors[0]) == torch.float32
    )


def _address(tensor: Optional[Tensor]) -> int:
    return 0 if tensor is None else tensor.data_ptr()
