"""Products of one expert's rows, on a CPU.

Dimensions: n rows of the expert, I and O the sizes of a weight.
"""

import re
from functools import lru_cache
from pathlib import Path
from typing import Optional

import torch
from torch import Tensor

FEW_ROWS = 4
ROOM = 2**18  # elements
_linear = getattr(torch.ops.mkldnn, "_linear_pointwise", None) if torch.backends.mkldnn.is_available() else None


class RunProducts:
    """torch's own products."""

    @staticmethod
    def padding(n: int, dtype: torch.dtype) -> int:
        """How many rows without meaning a run of *n* rows should get."""
        return 0

    @staticmethod
    def rows(a: Tensor, weight: Tensor, bias: Optional[Tensor] = None) -> Tensor:
        """a (n, I), weight (I, O) and bias (O,) -> a weight + bias (n, O)"""
        return torch.mm(a, weight) if bias is None else torch.addmm(bias, a, weight)

    @staticmethod
    def weight(a: Tensor, b: Tensor, out: Tensor) -> None:
        """a (n, I) and b (n, O) -> out (I, O), a transposed times b"""
        torch.mm(a.t(), b, out=out)


class OneDNNProducts(RunProducts):
    """Products through oneDNN in float32, for which torch itself takes MKL; torch's for other dtypes and few rows.

    The same operation is what torch.compile takes for a linear layer on a CPU. oneDNN compiles it anew, in 0.3 to 1 ms
    and 0.7 MB, for every number of rows, and the experts' numbers of rows are others at every step: so runs are filled
    up to one of four numbers per power of two.
    """

    @staticmethod
    def padding(n: int, dtype: torch.dtype) -> int:
        if dtype != torch.float32 or n <= FEW_ROWS:
            return 0
        step = 1 << max(2, n.bit_length() - 3)
        return -n % step

    @staticmethod
    def rows(a: Tensor, weight: Tensor, bias: Optional[Tensor] = None) -> Tensor:
        if a.dtype != torch.float32 or len(a) <= FEW_ROWS:
            return RunProducts.rows(a, weight, bias)
        return _linear(a, weight.t(), bias, "none", [], "")

    @staticmethod
    def weight(a: Tensor, b: Tensor, out: Tensor) -> None:
        if a.dtype != torch.float32 or len(a) <= FEW_ROWS:
            return RunProducts.weight(a, b, out)
        step = max(128, ROOM // b.size(1))  # there is no product into *out*: keep what is copied there small
        for start in range(0, a.size(1), step):
            a_t = a[:, start : start + step].t().contiguous()
            out[start : start + step] = _linear(a_t, b.t(), None, "none", [], "")


def has_onednn() -> bool:
    """Whether torch can call oneDNN on rows and weights as they are."""
    return _linear is not None


@lru_cache(maxsize=None)
def onednn_is_faster() -> bool:
    """Whether MKL, which keeps to AVX2 on CPUs that are not Intel's, leaves half of this one's units idle."""
    capability = getattr(torch.backends.cpu, "get_cpu_capability", lambda: "unknown")()
    cpuinfo = Path("/proc/cpuinfo")
    full_width = cpuinfo.is_file() and has_full_width(cpuinfo.read_text())
    return has_onednn() and full_width and capability == "AVX512"


def has_full_width(cpuinfo: str) -> bool:
    """Whether /proc/cpuinfo tells of an AMD CPU that is Zen 5 (family 26) or later.

    Zen 4 has AVX-512 too, but computes it in two halves: as fast as AVX2 (docs/performance.md).
    """
    family = re.search(r"cpu family\s*:\s*(\d+)", cpuinfo)
    return "AuthenticAMD" in cpuinfo and family is not None and int(family[1]) >= 26
