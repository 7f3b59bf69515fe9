"""The rows of an experiment's table against one of them, seed by seed."""

from statistics import fmean
from typing import List, Mapping, Optional, Sequence

from fairseq_hyperrouter.analysis.table import markdown_table

Row = Mapping[Optional[int], Mapping[int, float]]
"""{k: {seed: metric}}; k is None for a model without experts."""


def comparison(rows: Mapping[str, Row], base: str, metric: str) -> str:
    """A table of how far every other row is from the row *base*, with a line above that says so.

    1. A seed's difference: perplexity in percent of the base's of this seed, bits as they are. Trainings of one seed
       see the same batches, so that their difference says more than that of two means does.
    2. Over the seeds that both rows have: mean (least to most). Where both ends have one sign, the seeds agree.

    A model without experts is compared at every k. A cell is empty where one of the two has nothing.
    """
    top_ks = sorted({k for at in rows.values() for k in at if k is not None})
    in_percent = metric == "perplexity"
    table: List[List[str]] = [[f"against {base} at k =", *map(str, top_ks)]]
    for name, row in rows.items():
        if name != base:
            found = [_differences(_at(row, k), _at(rows[base], k), in_percent) for k in top_ks]
            table.append([name, *(_cell(differences, 1 if in_percent else 3) for differences in found)])
    unit = "% of its perplexity" if in_percent else metric.replace("_", " ")
    about = f"Against {base}, in {unit}, seed by seed: mean (least to most). Below 0 is better."
    return f"{about}\n\n{markdown_table(table)}"


def _at(row: Row, k: int) -> Mapping[int, float]:
    return row.get(k, row.get(None, {}))


def _differences(own: Mapping[int, float], base: Mapping[int, float], in_percent: bool) -> List[float]:
    both = [(own[seed], base[seed]) for seed in own if seed in base]
    return [100 * (one / other - 1) if in_percent else one - other for one, other in both]


def _cell(differences: Sequence[float], digits: int) -> str:
    if not differences:
        return ""
    mean, least, most = (f"{of(differences):+.{digits}f}" for of in (fmean, min, max))
    return mean if len(differences) == 1 else f"{mean} ({least} to {most})"
