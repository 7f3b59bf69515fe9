"""Where our C code, which autograd does not see, may do torch's work."""

import torch
from torch import Tensor

from fairseq_hyperrouter.torch_modes import has_tangents, product_dtype, trains

from . import run_products


def has_native() -> bool:
    """Whether products of ours (run_products.c) were compiled, and this processor has the AVX-512 that they need."""
    return run_products is not None


def torch_keeps_to_avx2() -> bool:
    """Whether torch's products, MKL's, leave AVX-512 units unused that ours use: those of AMD's."""
    return has_native() and bool(run_products.amd)


def may_use_addresses(*tensors: Tensor) -> bool:
    """Whether C code of ours can compute a function of *tensors*: in float32 on a CPU.

    Not where a derivative may be asked for, backward or forward, nor where a trace is recorded.
    """
    return (
        all(tensor.device.type == "cpu" and tensor.dtype == torch.float32 for tensor in tensors)
        and not trains(*tensors)
        and not has_tangents(*tensors)
        and not torch.jit.is_tracing()
    )


def serves_inference(*tensors: Tensor) -> bool:
    """Whether C code of ours for AVX-512 can compute a product of *tensors* where no derivative is asked for.

    Not where autocast computes it in another dtype.
    """
    return has_native() and may_use_addresses(*tensors) and product_dtype(tensors[0]) == torch.float32
