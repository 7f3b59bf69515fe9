"""Tables of experiments in docs/ are of the numbers in docs/numbers/: means, deviations, differences by the seed."""

import json
import re
import statistics
from typing import Dict, List

import pytest

from tests.commands import REPO

DOCS = [path.read_text(encoding="utf-8") for path in sorted((REPO / "docs").glob("*.md"))]
NUMBERS = sorted((REPO / "docs" / "numbers").glob("*.json"))


def table(block: str) -> Dict[str, Dict[str, str]]:
    """{row: {column: cell}} of a Markdown table."""
    head, _, *rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in block.splitlines()]
    return {row: dict(zip(head[1:], cells)) for row, *cells in rows}


def numbers(cell: str) -> List[float]:
    """(a mean ± its deviation) or (a mean (least to most)) -> all of them."""
    return [float(number.replace(",", "")) for number in re.findall(r"[-+]?[\d,]*\.?\d+", cell)]


def check(cell: str, *expected: float) -> None:
    """The numbers of *cell* are the *expected*, but for what its digits leave out."""
    digits = len(re.match(r"[-+\d,]+\.?(\d*)", cell)[1])
    assert numbers(cell) == pytest.approx(expected, abs=0.51 * 10**-digits, rel=0), cell


@pytest.mark.parametrize("path", NUMBERS, ids=lambda path: path.stem)
def test_table_is_of_its_numbers(path):
    written = json.loads(path.read_text())
    found = [blocks for blocks in (doc.split("\n\n") for doc in DOCS) if f"`{written['command']}`" in blocks]
    assert len(found) == 1
    command = found[0].index(f"`{written['command']}`")
    about, first, *others = found[0][command - 1 : command] + found[0][command + 1 :]
    runs = written["runs"]
    for what in ("title", "setting"):
        assert written[what] in about
    for what in {word for run in runs for by in run["trained_by"] for word in (by["machine"], by["commit"][:10])}:
        assert what in about.replace("\n", " ")
    seeds = sorted({run["seed"] for run in runs})
    assert re.search(r"seeds? ([\d, ]+);", about)[1] == ", ".join(map(str, seeds))
    assert re.search(r"(\d+)\s+updates;", about)[1] == str(*{run["updates"] for run in runs})

    rows, unit = table(first), re.match(r"\| *(.+?) at k =", first)[1]
    values: Dict[str, Dict[str, Dict[int, float]]] = {}
    """{row: {k: {seed: metric}}}; "" for k of a model without experts"""
    for run in runs:
        for swept in run["sweep"]:
            k = "" if swept["top_k"] is None else str(swept["top_k"])
            values.setdefault(run["row"], {}).setdefault(k, {})[run["seed"]] = swept[unit.replace(" ", "_")]
    top_ks = sorted({int(k) for at in values.values() for k in at if k})
    assert list(rows) == list(values)
    for row, at in values.items():
        logged = [run["logged"] for run in runs if run["row"] == row]
        assert [int(column) for column in rows[row] if column.isdigit()] == top_ks
        for column, cell in rows[row].items():
            if column.isdigit():
                expected = [*at.get("" if cell.endswith(" (dense)") else column, {}).values()]
            else:
                names = [f"{prefix}{column}".replace(" ", "_") for prefix in ("", "valid moe ")]
                expected = [one[name] for one in logged for name in names if name in one]
            of = (statistics.fmean, statistics.stdev) if len(expected) > 1 else (statistics.fmean,)
            if expected:
                check(cell, *(one(expected) for one in of))
            else:
                assert not cell

    for quoted, plain in re.findall(r"--against (?:'([^']+)'|(\S+))", written["command"]):
        base = re.match(r"Against (.+), in (% of its perplexity|bits)", others[0])
        assert base[1] == (quoted or plain)
        compared = table(others[1])
        assert list(compared) == [row for row in values if row != base[1]]
        for row, cells in compared.items():
            assert [*map(int, cells)] == top_ks
            for column, cell in cells.items():
                own, other = (values[name].get(column) or values[name][""] for name in (row, base[1]))
                scale = {seed: 100 / other[seed] if base[2][0] == "%" else 1 for seed in own}
                differences = [(own[seed] - other[seed]) * scale[seed] for seed in own]
                check(cell, statistics.fmean(differences), min(differences), max(differences))
        others = others[2:]
