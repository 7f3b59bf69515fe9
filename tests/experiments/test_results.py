"""The table and files of results, from hand-made ones."""

import json
import re
from dataclasses import replace

import pytest

from fairseq_hyperrouter.experiments.experiment import Experiment, Run
from fairseq_hyperrouter.experiments.results import Result, markdown, write_results


def result(name, seed, perplexities, row=None, **logged):
    run = Run(name, row or name, seed, tuple(perplexities), ("--lr", "1"), 9)
    sweep = [{"top_k": k, "perplexity": p, "checkpoint": "x/checkpoint_last.pt"} for k, p in perplexities.items()]
    return Result(run, sweep, logged)


RESULTS = [
    result("a", 1, {1: 20.0, 2: 11.0}, train_wps=1000.0),
    result("a", 2, {1: 22.0, 2: 11.0}, train_wps=2000.0),
    result("b at 1", 1, {1: 9.5}, row="b"),
    result("b at 2", 1, {2: 9.0}, row="b"),
    result("dense", 1, {None: 12.25}),
]
EXPERIMENT = Experiment("A title", "small", "perplexity", ("train_wps",), "last", None, (), ())


def test_table():
    """Means of seeds with their sample standard deviation; runs of one row together; a dense model has one number."""
    about, command, table = markdown(EXPERIMENT, RESULTS, "the command").split("\n\n")
    assert about.startswith("**A title** (small; seeds 1, 2; 9 updates; ") and command == "`the command`"
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in table.splitlines()]
    assert cells[0] == ["perplexity at k =", "1", "2", "training tokens/s"]
    assert cells[2:] == [
        ["a", "21.00 ± 1.41", "11.00 ± 0.00", "1,500 ± 707"],
        ["b", "9.500 (seed 1)", "9.000 (seed 1)", ""],
        ["dense", "12.25 (seed 1) (dense)", "", ""],
    ]


def test_table_of_dense_models_alone():
    """As long as nothing else is done."""
    dense = result("dense", 1, {None: 12.25}, train_wps=3000.0)
    table = markdown(EXPERIMENT, [dense], "").split("\n\n")[-1]
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in table.splitlines()]
    assert cells[0] == ["perplexity at k =", "", "training tokens/s"]
    assert cells[2] == ["dense", "12.25 (dense)", "3,000"]


def test_a_training_that_ended_before_its_last_update():
    """By --patience, say: what it was trained for counts, not what it was to be trained for."""
    about = markdown(EXPERIMENT, [*RESULTS, result("c", 1, {1: 1.0}, train_num_updates=7.0)], "")
    assert "; 7 or 9 updates; " in about


def test_a_name_that_nothing_logged():
    """As a mistyped one."""
    mistyped = replace(EXPERIMENT, logged=("train_wps", "train_wpss"))
    assert markdown(mistyped, RESULTS, "").endswith(
        "|\n\nNo training logged train_wpss: results.json has the names of what they did log."
    )


def test_rows_against_one():
    """Below the table, where something is done of that row."""
    base, dense = markdown(EXPERIMENT, RESULTS, "", ["a", "dense", "not done"]).split("\n\n")[3::2]
    assert base.startswith("| against a at k =") and "| -52.5 (seed 1) |" in base  # 9.5 of 20
    assert dense.startswith("| against dense at k =")


def trained_by(*commits, machine="a CPU"):
    shared = {"version": "0.1.0", "dirty": False, "machine": machine, "torch": "2.0", "cpu": True}
    return [{**shared, "commit": commit} for commit in commits]


def test_head_of_runs_that_were_trained_elsewhere():
    """Machines and commits are those of the trainings; where they differ, it says so."""

    def head(*records):
        results = [result(str(number), 1, {1: 9.0})._replace(trained_by=one) for number, one in enumerate(records)]
        return re.search(r"9 updates; (.*)\)\.", markdown(EXPERIMENT, results, ""))[1]

    one, other = "1" * 40, "2" * 40
    same = trained_by(one)
    assert head(same, same) == "machine a CPU, torch 2.0; version 0.1.0 at 1111111111"
    resumed = [*same, {**same[0], "dirty": True, "commit": other}]
    versions = "2 versions: 0.1.0 at 1111111111 / 0.1.0 at 2222222222, changed"
    assert head(same, resumed) == f"machine a CPU, torch 2.0; {versions}"
    elsewhere = trained_by(None, machine="a GPU")
    versions = "2 versions: 0.1.0 at 1111111111 / 0.1.0"
    assert head(same, elsewhere) == f"2 machines: a CPU, torch 2.0 / a GPU, torch 2.0; {versions}"
    assert head(same, []).startswith("2 machines: a CPU, torch 2.0 / not recorded; 2 versions: ")
    assert head([], []) == "machine not recorded; version not recorded"


@pytest.mark.parametrize("which", [RESULTS, RESULTS[-1:]], ids=["all", "dense alone"])
def test_files(tmp_path, which):
    paths = write_results(EXPERIMENT, which, tmp_path, "the command")
    assert [path.name for path in paths] == ["results.json", "results.md", "results.png"]
    written = json.loads(paths[0].read_text())
    assert [run["name"] for run in written["runs"]] == [one.run.name for one in which]
    assert written["runs"][0]["sweep"][0]["checkpoint"] == "checkpoint_last.pt"
    assert "/" not in json.dumps(written["runs"])
    assert paths[2].read_bytes().startswith(b"\x89PNG")
    assert write_results(EXPERIMENT, [], tmp_path / "none", "") == []
