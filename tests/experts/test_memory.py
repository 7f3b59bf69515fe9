"""What the process keeps of the memory it got from the kernel."""

import ctypes
import os
import platform
import subprocess
import sys
from typing import List

import pytest

TENSORS = """
import ctypes
import torch
from fairseq_hyperrouter.experts.memory import keep_freed_memory

class Mallinfo(ctypes.Structure):
    names = "arena ordblks smblks hblks hblkhd usmblks fsmblks uordblks fordblks keepcost"
    _fields_ = [(name, ctypes.c_size_t) for name in names.split()]

mallinfo = ctypes.CDLL(None).mallinfo2
mallinfo.restype = Mallinfo
if {asked}:
    keep_freed_memory()
before = mallinfo()
tensors = [torch.empty(4 * 2**20) for _ in range(16)]  # of 16 MiB
mapped = mallinfo().hblkhd - before.hblkhd  # bytes in mappings of their own, which are given back when freed
del tensors
print(mapped, mallinfo().fordblks)  # and the free bytes that the process has
"""


@pytest.mark.skipif(
    platform.libc_ver()[0] != "glibc" or not hasattr(ctypes.CDLL(None), "mallinfo2"),
    reason="only glibc from 2.33 on tells what it keeps",
)
def test_freed_memory_is_kept() -> None:
    """What a step frees is there for the next step.

    By the C library's own account: not every kernel counts the pages it gives.
    """
    plain = {name: value for name, value in os.environ.items() if not name.startswith(("MALLOC_", "GLIBC_", "LD_PRE"))}

    def mapped_and_free(asked: bool) -> List[int]:
        program = [sys.executable, "-c", TENSORS.format(asked=asked)]
        return [
            int(n)
            for n in subprocess.run(program, check=True, capture_output=True, text=True, env=plain).stdout.split()
        ]

    tensors = 16 * 16 * 2**20
    assert mapped_and_free(False)[0] >= tensors
    mapped, free = mapped_and_free(True)
    assert mapped == 0 and free >= tensors
