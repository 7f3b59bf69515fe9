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


class Products(ABC):
    """What these backends multiply with. Rows that are not carried out give 0 and are not looked at."""

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
