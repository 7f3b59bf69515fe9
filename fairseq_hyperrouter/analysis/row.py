"""What an evaluation came to: a row of the tables of ``fairseq-hyperrouter sweep``, a point of its curves."""

from typing import Any, Dict

Row = Dict[str, Any]
LIMITS = ("top_p", "threshold")
"""What can give a token fewer than k experts where its router is sure."""


def limit_of(row: Row) -> str:
    """The name of the limit in force, as options call it: "top-p"; nothing where there was none."""
    return next((name.replace("_", "-") for name in LIMITS if row[name] is not None), "")
