"""Where our C code, which autograd does not see, may do torch's work."""

import torch
from torch import Tensor

from fairseq_hyperrouter.derivatives import has_tangents, trains
from fairseq_hyperrouter.dtypes import product_dtype

from . import run_products


def has_native() -> bool:
    """Whether the C code was compiled and this processor can run it."""
    return run_products is not None


def torch_keeps_to_avx2() -> bool:
    """Whether torch's products, MKL's, leave AVX-512 units unused that ours use: those of AMD's."""
    return has_native() and bool(run_products.amd)


def may_use_addresses(*tensors: Tensor) -> bool:
    """Whether it can compute a function of *tensors*: in float32 on a CPU.

    Not where a derivative may be asked for, backward or forward, nor where a trace is recorded.
    """
    return (
        all(tensor.device.type == "cpu" and tensor.dtype == torch.float32 for tensor in tensors)
        and not trains(*tensors)
        and not has_tangents(*tensors)
        and not torch.jit.is_tracing()
    )


def serves_inference(*tensors: Tensor) -> bool:
    """Whether it can in the place of an operation of torch's that autocast may compute in another dtype."""
    return has_native() and may_use_addresses(*tensors) and product_dtype(tensors[0]) == torch.float32
