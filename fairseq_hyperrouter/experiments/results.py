"""The results of an experiment: read from the folders of its runs, written as numbers, table and picture."""

import json
import statistics
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Callable, Dict, List, Mapping, NamedTuple, Optional, Sequence

from fairseq_hyperrouter.analysis.pictures import metric_curves
from fairseq_hyperrouter.analysis.table import markdown_table

from .comparison import comparison, listed
from .experiment import Experiment, Run
from .provenance import machine_of, software_of
from .run_folder import LOGGED, SWEEP, RunFolder

DENSE = None
"""Stands for k in the results of a model without experts."""


class Result(NamedTuple):
    """What a run came to."""

    run: Run
    sweep: Sequence[Dict[str, Any]]
    """Rows of ``fairseq-hyperrouter sweep``."""
    logged: Dict[str, float]
    """What its training logged last: means over its last epoch."""
    trained_by: Sequence[Dict[str, Any]] = ()
    """The ``provenance`` of its training, several where it went on elsewhere."""

    @property
    def updates(self) -> int:
        """What it was trained for: fewer than its ``--max-update`` where another option ended it."""
        return int(self.logged.get("train_num_updates", self.run.updates))


def read_results(folders: Sequence[RunFolder]) -> List[Result]:
    """What the runs that are done came to."""
    return [Result(one.run, one.read(SWEEP), one.read(LOGGED), one.trained_by) for one in folders if one.is_evaluated]


def write_results(
    experiment: Experiment, results: Sequence[Result], folder: Path, command: str, against: Sequence[str] = ()
) -> List[Path]:
    """Write results.json, .md and .png into *folder*, each whole even when two runners do; return their paths."""
    if not results:
        return []
    content = {
        "title": experiment.title,
        "setting": experiment.setting,
        "command": command,
        "runs": [
            {
                "name": result.run.name,
                "row": result.run.row,
                "seed": result.run.seed,
                "updates": result.updates,
                "options": result.run.options,
                "trained_by": result.trained_by,
                "sweep": [{**row, "checkpoint": Path(row["checkpoint"]).name} for row in result.sweep],
                "logged": result.logged,
            }
            for result in results
        ],
    }
    values = {row: {k: (*of.values(),) for k, of in at.items()} for row, at in collected(experiment, results).items()}
    figure = metric_curves(values, experiment.metric.replace("_", " "), experiment.title)
    paths = [folder / f"results.{kind}" for kind in ("json", "md", "png")]
    with TemporaryDirectory(prefix="results.", dir=folder) as unfinished:
        numbers, table, picture = new = [Path(unfinished, path.name) for path in paths]
        numbers.write_text(json.dumps(content, indent=1) + "\n")
        table.write_text(markdown(experiment, results, command, against) + "\n")
        figure.savefig(picture, dpi=120)
        for one, path in zip(new, paths):
            one.replace(path)
    return paths


def markdown(experiment: Experiment, results: Sequence[Result], command: str, against: Sequence[str] = ()) -> str:
    """The table, with what it is about above it: metric at every k, mean ± standard deviation over the seeds.

    Below it one table for each of the rows *against* which the others are to be compared.
    """
    values = collected(experiment, results)
    seeds = sorted({result.run.seed for result in results})
    top_k = sorted({k for row in values.values() for k in row if k is not DENSE})
    numbers = [*map(str, top_k)] or [""]  # where only dense models are done
    head = [f"{experiment.metric.replace('_', ' ')} at k =", *numbers, *map(_column, experiment.logged)]
    rows = [head]
    for row, at in values.items():
        cells = [_of_seeds(at.get(k, {}), seeds) for k in top_k]
        if DENSE in at:
            cells = [f"{_of_seeds(at[DENSE], seeds)} (dense)", *[""] * (len(numbers) - 1)]
        own = [result.logged for result in results if result.run.row == row]
        logged = [_cell([one[name] for one in own if name in one]) for name in experiment.logged]
        rows.append([row, *cells, *logged])
    updates = sorted({result.updates for result in results})
    unknown = [name for name in experiment.logged if not any(name in result.logged for result in results)]
    spread = " Mean ± standard deviation over the seeds." if len(seeds) > 1 else ""
    about = [
        f"**{experiment.title}** ({experiment.setting}; {listed('seed', seeds)}; {' or '.join(map(str, updates))} "
        f"updates; {_trained_by('machine', machine_of, results)}; {_trained_by('version', software_of, results)})."
        f"{spread}",
        f"`{command}`" if command else "",
        markdown_table(rows),
        f"No training logged {', '.join(unknown)}: results.json has the names of what they did log." if unknown else "",
        *(comparison(values, row, experiment.metric) for row in dict.fromkeys(against) if row in values),
    ]
    return "\n\n".join(part for part in about if part)


def collected(experiment: Experiment, results: Sequence[Result]) -> Dict[str, Dict[Optional[int], Dict[int, float]]]:
    """{row: {k: {seed: metric}}}, in the order of the file."""
    values: Dict[str, Dict[Optional[int], Dict[int, float]]] = {}
    for result in results:
        row = values.setdefault(result.run.row, {})
        for found in result.sweep:
            row.setdefault(found["top_k"], {})[result.run.seed] = found[experiment.metric]
    return values


def _trained_by(what: str, in_words: Callable[[Dict[str, Any]], str], results: Sequence[Result]) -> str:
    """The machine or version that trained the *results*; each of them where there were several."""
    found: Dict[str, None] = {}
    for result in results:
        found.update(dict.fromkeys(map(in_words, result.trained_by) if result.trained_by else ["not recorded"]))
    return f"{len(found)} {what}s: {' / '.join(found)}" if len(found) > 1 else f"{what} {next(iter(found))}"


def _of_seeds(values: Mapping[int, float], seeds: Sequence[int]) -> str:
    """Mean and deviation; and which seeds they are of, where others of the *seeds* are not done."""
    few = f" ({listed('seed', sorted(values))})" if 0 < len(values) < len(seeds) else ""
    return _cell([*values.values()]) + few


def _cell(values: Sequence[float]) -> str:
    if not values:
        return ""
    mean = statistics.fmean(values)
    digits = 0 if mean >= 1000 else 2 if mean >= 10 else 3
    spread = f" ± {statistics.stdev(values):.{digits}f}" if len(values) > 1 else ""
    return f"{mean:,.{digits}f}{spread}"


def _column(name: str) -> str:
    return name.replace("train_wps", "training tokens/s").replace("valid_moe_", "").replace("_", " ")
