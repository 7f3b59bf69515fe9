"""Products of one expert's rows, on a CPU, and what lies between them.

Dimensions: T tokens, n rows of the expert, I and O the sizes of a weight, D model, F hidden.
"""

from dataclasses import dataclass
from typing import Optional

import torch
from torch import Tensor

from .weights import sum_dtype


@dataclass
class Rows:
    """n of the rows of a tensor, or all."""

    a: Tensor
    """(T, I), or (n, I) without *token*."""
    token: Optional[Tensor] = None
    """(n,) which they are."""

    def gathered(self) -> Tensor:
        """(n, I)"""
        return self.a if self.token is None else self.a.index_select(0, self.token)

    @property
    def n(self) -> int:
        return len(self.a if self.token is None else self.token)


class RunProducts:
    """With torch's operations. ``native_products.py`` has them all once more."""

    @staticmethod
    def used_twice(rows: Rows) -> Rows:
        """*rows* as the methods below take them where several do."""
        return Rows(rows.gathered())

    @staticmethod
    def rows(rows: Rows, weight: Tensor, bias: Optional[Tensor] = None, *, transposed: bool = False) -> Tensor:
        """rows weight + bias (n, O), with weight (I, O), or (O, I) if *transposed*."""
        weight = weight.t() if transposed else weight
        return torch.mm(rows.gathered(), weight) if bias is None else torch.addmm(bias, rows.gathered(), weight)

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
        output = cls.rows(Rows(a), weight, bias, transposed=transposed).to(y.dtype)
        y.index_add_(0, token, output if gate is None else output.mul_(gate[:, None]))

    @staticmethod
    def weight(a: Rows, b: Rows, gate: Optional[Tensor], dweight: Tensor, dbias: Tensor) -> None:
        """dweight (I, O) = a transposed times gate b; dbias (O,) = the sum of the latter's rows."""
        scaled = b.gathered()
        scaled = scaled if gate is None else (scaled * gate[:, None]).to(scaled.dtype)
        torch.mm(a.gathered().t(), scaled, out=dweight)
        torch.sum(scaled, 0, out=dbias)

    @staticmethod
    def gates(dhidden: Tensor, activated: Tensor, dy: Rows, bias: Tensor, gate: Tensor, dgate: Tensor) -> None:
        """dgate (n,) = the gates' gradient, dhidden (n, F) . activated + dy . bias; then dhidden *= gate."""
        dtype = sum_dtype(dhidden)
        dgate.copy_(torch.linalg.vecdot(dhidden.to(dtype), activated.to(dtype)))
        dgate += dy.gathered() @ bias
        dhidden.mul_(gate[:, None])
