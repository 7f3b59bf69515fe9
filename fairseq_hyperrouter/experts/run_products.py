"""Products of one expert's rows, on a CPU, and what lies between them.

Dimensions: T tokens, n rows of the expert, I and O the sizes of a weight, D model, F hidden.
"""

from typing import Optional, Tuple

import torch
from torch import Tensor

from .weights import sum_dtype


class TorchProducts:
    """With torch's operations. ``native_products.py`` has them all once more."""

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
