"""The rows of an experiment's table against one of them, seed by seed."""

import math
from statistics import fmean
from typing import Dict, Mapping, Optional, Sequence, Set

from fairseq_hyperrouter.analysis.table import markdown_table

Row = Mapping[Optional[int], Mapping[int, float]]
"""{k: {seed: metric}}; k is None for a model without experts."""


def comparison(rows: Mapping[str, Row], base: str, metric: str) -> str:
    """A table of how far every other row is from the row *base*, with a line above that says so; "" without others.

    1. A seed's difference: perplexity in percent of the base's of this seed, bits as they are. Trainings of one seed
       see the same batches, so that their difference says more than that of two means does.
    2. Over the seeds that both rows have: mean (least to most), and which these are if not all. Where both ends have
       one sign, neither of them 0, the seeds agree.

    A model without experts is compared at every k. A cell is empty where one of the two has nothing.
    """
    others = [name for name in rows if name != base]
    if not others:
        return ""
    top_ks = sorted({k for at in rows.values() for k in at if k is not None}) or [None]
    seeds = {seed for at in rows.values() for of_seeds in at.values() for seed in of_seeds}
    in_percent = metric == "perplexity"
    table = [[f"against {base} at k =", *("" if k is None else str(k) for k in top_ks)]]
    for name in others:
        found = [_differences(_at(rows[name], k), _at(rows[base], k), in_percent) for k in top_ks]
        table.append([name, *(_cell(differences, seeds, 1 if in_percent else 3) for differences in found)])
    unit = "% of its perplexity" if in_percent else metric.replace("_", " ")
    about = f"Against {base}, in {unit}, seed by seed: mean (least to most). Below 0 is better."
    return f"{about}\n\n{markdown_table(table)}"


def _at(row: Row, k: Optional[int]) -> Mapping[int, float]:
    return row.get(k, row.get(None, {}))


def _differences(own: Mapping[int, float], base: Mapping[int, float], in_percent: bool) -> Dict[int, float]:
    both = {seed: (own[seed], base[seed]) for seed in sorted(own) if seed in base}
    return {seed: 100 * (one - other) / other if in_percent else one - other for seed, (one, other) in both.items()}


def _cell(differences: Mapping[int, float], seeds: Set[int], digits: int) -> str:
    values = [*differences.values()]
    if not values:
        return ""
    if not all(map(math.isfinite, values)):
        return "nan"
    mean, least, most = (f"{of(values):+.{digits}f}" for of in (fmean, min, max))
    inside = [f"{least} to {most}"] if len(values) > 1 else []
    inside += [listed("seed", [*differences])] if len(values) < len(seeds) else []
    return f"{mean} ({'; '.join(inside)})" if inside else mean


def listed(what: str, numbers: Sequence[int]) -> str:
    """(seed, [1, 2]) -> seeds 1, 2"""
    return f"{what}{'s' if len(numbers) > 1 else ''} {', '.join(map(str, numbers))}"
