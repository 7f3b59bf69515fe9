"""Room for large tensors on a CPU."""

import ctypes
import mmap
import sys
from typing import Optional

from torch import Tensor

_LARGE = 4 * 2**20
_HUGE_PAGES = getattr(mmap, "MADV_HUGEPAGE", None)


def _libc() -> Optional[ctypes.CDLL]:
    if not sys.platform.startswith("linux") or _HUGE_PAGES is None:
        return None
    library = ctypes.CDLL(None)
    library.madvise.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
    return library


_LIBC = _libc()
_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3  # of glibc's malloc.h
_LARGEST_KEPT = 32 * 2**20  # glibc takes no larger one


def keep_freed_memory() -> None:
    """Have glibc keep what this process frees, in pieces of up to 32 MiB, for its next tensors.

    It gives free memory at the end of its heap back to the kernel, and gets it again page by page, each zeroed at its
    first touch. Without that, forward passes over 4,096 tokens with one expert each took 0.86 of the time, a whole
    evaluation 0.96. The price is that a process does not shrink.
    """
    if hasattr(_LIBC, "mallopt"):
        _LIBC.mallopt(_M_MMAP_THRESHOLD, _LARGEST_KEPT)
        _LIBC.mallopt(_M_TRIM_THRESHOLD, 2**31 - 1)


def in_huge_pages(room: Tensor) -> Tensor:
    """*room*, which nobody wrote to yet, in huge pages if it is large, in main memory, and Linux gives them when asked.

    What is freed goes back to the kernel when it is large, and comes again page by page, each zeroed at its first
    touch: writing 64 MiB takes 28 ms instead of 2 ms where the pages are of 4 KiB, and 4 ms where they are of 2 MiB.
    Reading is faster too, because the processor need not look up where every 4 KiB are: few rows of 16 experts take
    0.8 to 0.88 of the time.
    """
    if _LIBC is not None and room.device.type == "cpu" and room.nbytes >= _LARGE:
        start = -(-room.data_ptr() // mmap.PAGESIZE) * mmap.PAGESIZE
        _LIBC.madvise(start, room.data_ptr() + room.nbytes - start, _HUGE_PAGES)  # an advice: may be refused
    return room
