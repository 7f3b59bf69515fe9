"""Evaluate checkpoints at a list of experts per token: ``fairseq-hyperrouter sweep``."""

import json
import logging
from pathlib import Path
from typing import Any, Iterator, List, Mapping, Optional, Sequence

from fairseq_hyperrouter.config import format_ints

from .evaluation import evaluators
from .pictures import perplexity_curves
from .row import Row, limit_of
from .table import markdown_table

logger = logging.getLogger(__name__)


def sweep(
    checkpoints: Sequence[Path],
    data: str,
    top_k: Optional[Sequence[int]] = None,
    *,
    limits: Sequence[Mapping[str, float]] = (),
    **options: Any,
) -> Iterator[Row]:
    """Evaluate every checkpoint at every k, and within each of *limits*, as {"top_p": 0.5}: a row of ``Evaluator.at``.

    By default at 1, 2, 4, ... and all of its experts. A checkpoint without experts gives one row, its "top_k" None; one
    whose router has no probabilities none for *limits*. The other *options* are Evaluator's.

    Raises:
        UserError (a ValueError): a k that a checkpoint cannot have, a file that is missing or of another model.
    """
    for evaluator in evaluators(checkpoints, data, **options):
        for k in evaluator.top_ks("--top-k", top_k):
            yield evaluator.at(k)
        if limits and not evaluator.has_probabilities:
            logger.warning(f"--top-p, --threshold: left out for {evaluator.label}, whose router has no probabilities")
            continue
        for limit in limits:
            yield evaluator.at(evaluator.model.decoder.moe_config.moe_expert_count, **limit)


def markdown(rows: Sequence[Row]) -> str:
    """The rows as a Markdown table; for several checkpoints, their perplexities side by side first."""
    detail = [["model", "k", "perplexity", "bits/token", "bits/char", "tokens/s", "active params", "MFLOPs/token"]]
    for row in rows:
        detail.append(
            [
                row["label"],
                f"{_k(row)}: {row['mean_top_k']:.2f}" if limit_of(row) else _k(row),
                f"{row['perplexity']:.2f}",
                f"{row['bits_per_token']:.4f}",
                f"{row['bits_per_character']:.4f}",
                f"{row['tokens_per_second']:,.0f}",
                f"{row['active_parameters']:,}",
                f"{row['flops_per_token'] / 1e6:.2f}",
            ]
        )
    labels = list(dict.fromkeys(row["label"] for row in rows))
    if len(labels) == 1:
        return markdown_table(detail)
    top_ks = list(dict.fromkeys(_k(row) for row in rows))
    found = {(_k(row), row["label"]): f"{row['perplexity']:.2f}" for row in rows}
    side = [["perplexity at k =", *top_ks]] + [
        [label, *(found.get((k, label), "") for k in top_ks)] for label in labels
    ]
    return markdown_table(side) + "\n\n" + markdown_table(detail)


def _k(row: Row) -> str:
    if row["top_k"] is None:
        return "dense"
    limit = limit_of(row)
    return f"{limit} {row[limit.replace('-', '_')]:g}" if limit else format_ints(row["top_k"])


def write(rows: Sequence[Row], folder: Path, name: str = "sweep") -> List[Path]:
    """Write *name*.json, .md and .png into *folder* and return their paths."""
    folder.mkdir(parents=True, exist_ok=True)
    paths = [folder / f"{name}.{kind}" for kind in ("json", "md", "png")]
    paths[0].write_text(json.dumps(list(rows), indent=1) + "\n")
    paths[1].write_text(markdown(rows) + "\n")
    perplexity_curves(rows).savefig(paths[2], dpi=120)
    return paths
