"""Our C code for CPUs; each compiled module is None where it was not compiled, or made for another processor."""

from importlib import import_module
from types import ModuleType
from typing import Optional


def _compiled(name: str) -> Optional[ModuleType]:
    try:
        return import_module(f"{__name__}._{name}")
    except ImportError:
        return None


few_rows = _compiled("few_rows")
run_products = _compiled("run_products")
causal_attention = _compiled("causal_attention")
