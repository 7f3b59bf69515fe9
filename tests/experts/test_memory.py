"""What the process asks of the kernel."""

import platform
import subprocess
import sys

import pytest

FAULTS = """
import resource
import torch
from fairseq_hyperrouter.experts.memory import keep_freed_memory
if {kept}:
    keep_freed_memory()
def step():
    tensors = [torch.zeros(2**20) for _ in range(4)]  # of 4 MiB
for _ in range(3):
    step()
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(10):
    step()
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


@pytest.mark.skipif(
    platform.libc_ver()[0] != "glibc", reason="another C library keeps or returns memory in its own way"
)
def test_freed_memory_is_kept() -> None:
    """A step that follows others like it takes no page from the kernel anew."""

    def faults(kept: bool) -> int:
        program = [sys.executable, "-c", FAULTS.format(kept=kept)]
        return int(subprocess.run(program, check=True, capture_output=True, text=True).stdout)

    assert faults(True) < 100 < faults(False)
