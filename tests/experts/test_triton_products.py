"""The kernels compile for GPUs; what they compute is looked at in test_backend.py, by Triton's interpreter."""

import os
import subprocess
import sys

import pytest

from fairseq_hyperrouter.experts.backend import HAS_TRITON

COMPILE = """
import sys
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from fairseq_hyperrouter.experts.triton_products import ROWS, _rows, _weights

TABLES = ("tile_expert", "tile_start", "tile_end", "starts", "ends")
CONSTANTS = ("ROWS", "COLUMNS", "INNER", "PRECISION")
dtype, capability, precision = sys.argv[1:]
for tuned in (_rows, _weights):
    names = tuned.fn.arg_names
    types = {name: dtype if name in ("a", "b", "weight", "result") else "i32" for name in names}
    types.update({name: "*i64" for name in names if name in TABLES})
    types.update({name: "constexpr" for name in names if name in CONSTANTS})
    chosen = tuned.configs[-1]
    source = ASTSource(tuned.fn, types, {"ROWS": ROWS, "PRECISION": precision, **chosen.kwargs})
    options = {"num_warps": chosen.num_warps, "num_stages": chosen.num_stages}
    compiled = triton.compile(source, target=GPUTarget("cuda", int(capability), 32), options=options)
    print(len(compiled.asm["cubin"]), compiled.metadata.shared)
"""


@pytest.mark.skipif(not HAS_TRITON, reason="Triton is not installed")
@pytest.mark.parametrize("dtype, precision", [("*bf16", "ieee"), ("*fp32", "ieee"), ("*fp32", "tf32")])
@pytest.mark.parametrize("capability", [80, 90, 100])
def test_kernels_compile(dtype, precision, capability, tmp_path):
    """Compiling needs no GPU. A multiprocessor of compute capability 8 and later has at least 99 KiB to share."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    done = subprocess.run(
        [sys.executable, "-c", COMPILE, dtype, str(capability), precision],
        env={**environment, "TRITON_CACHE_DIR": str(tmp_path)},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    for line in done.stdout.splitlines():
        size, shared = map(int, line.split())
        assert size and shared <= 99 * 1024
    assert len(done.stdout.splitlines()) == 2
