"""Linear maps whose products are ours at inference where torch's keep to AVX2.

Dimensions: I inputs, O outputs.
"""

import torch.nn.functional as F
from torch import Tensor, nn

from fairseq_hyperrouter.experts.native_products import NativeRunProducts
from fairseq_hyperrouter.experts.run_products import Rows
from fairseq_hyperrouter.native.usable import serves_inference, torch_keeps_to_avx2

LEAST_ROWS = 16
"""With fewer, torch is as fast, which need not copy the weight first."""
LEAST_OUTPUTS = 64
"""With fewer, copying the rows takes as long as the product."""


class Linear(nn.Linear):
    """y = x W^T + b; where torch's keep to AVX2 with the products that experts have (run_products.c), in half the time.

    Not in training even without gradients: checkpointed activations are computed again with them, and must be the same.
    """

    @classmethod
    def like(cls, stock: nn.Linear) -> "Linear":
        """One that has the parameters of *stock*."""
        linear = cls(stock.in_features, stock.out_features, stock.bias is not None, device="meta")
        linear.weight, linear.bias = stock.weight, stock.bias
        return linear

    def forward(self, x: Tensor) -> Tensor:
        """(..., I) -> (..., O)"""
        parameters = (self.weight,) if self.bias is None else (self.weight, self.bias)
        many = self.out_features >= LEAST_OUTPUTS and x.numel() >= LEAST_ROWS * self.in_features
        many = many and x.size(-1) == self.in_features
        faster = not self.training and many and torch_keeps_to_avx2()
        if not faster or not serves_inference(x, *parameters):
            return F.linear(x, self.weight, self.bias)
        rows, weight = x.reshape(-1, self.in_features).contiguous(), self.weight.contiguous()
        bias = None if self.bias is None else self.bias.contiguous()
        return NativeRunProducts.rows(Rows(rows), weight, bias, transposed=True).view(*x.shape[:-1], -1)
