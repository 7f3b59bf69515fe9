import shutil
from pathlib import Path

import pytest

from fairseq_hyperrouter import UserError
from fairseq_hyperrouter.experts import backend
from fairseq_hyperrouter.native import causal_attention, usable


def test_compiled_where_it_can_be():
    cpuinfo = Path("/proc/cpuinfo")
    could = shutil.which("gcc") and cpuinfo.is_file() and "avx512f" in cpuinfo.read_text()
    assert not could or (usable.has_native() and causal_attention is not None)


def test_not_compiled(monkeypatch):
    monkeypatch.setattr(usable, "run_products", None)
    assert not usable.has_native() and not usable.torch_keeps_to_avx2()
    with pytest.raises(UserError, match="--moe-backend native: needs a processor with AVX-512, and a C compiler"):
        backend.check_backend("--moe-backend", "native")
