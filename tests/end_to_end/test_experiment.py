"""``fairseq-hyperrouter experiment``: trains, survives being killed, goes on, reports."""

import json
import re
import signal
import time

import pytest
import torch
import yaml

from tests import commands
from tests.commands import load, popen

UPDATES = 150  # enough that a training has not ended before the signal reaches it


def options(arguments):
    """["--lr", "0.1", "--cpu"] -> {"lr": "0.1", "cpu": True}"""
    found, name = {}, None
    for argument in map(str, arguments):
        if argument.startswith("--"):
            name = argument[2:]
            found[name] = True
        else:
            found[name] = argument
    return found


@pytest.fixture
def file(tmp_path):
    """write(**changes) -> an experiment's file."""

    def write(runs=None, **more):
        shared = options([*commands.TASK, *commands.MODEL, *commands.CRITERION, *commands.OPTIMIZER])
        given = {"batch-size": 4, "num-workers": 0, "disable-validation": True, "log-interval": 1}
        content = {
            "title": "Two models",
            "at": [1, 8],
            "options": {
                **shared,
                **given,
                **{"save-interval-updates": 10, "keep-interval-updates": 1, "max-update": UPDATES},
            },
            "runs": runs or {"smoe": {"moe-router": "smoe"}},
            "settings": {"tiny": {}},
            **more,
        }
        path = tmp_path / "tiny.yaml"
        path.write_text(yaml.safe_dump(content, sort_keys=False))
        return path

    return write


def arguments(file, data, out, *more):
    return ["-m", "fairseq_hyperrouter.commands", "experiment", file, "--data", data, "--out", out, "--cpu", *more]


@pytest.fixture
def undisturbed(once, file, data):
    """Perplexities and the checkpoint of an experiment that nothing ended."""

    def make(folder):
        assert experiment(file(), data, folder).code == 0
        return perplexities(folder)

    folder, found = once("undisturbed-experiment", make)
    return found, folder / "smoe-seed1" / "checkpoint_last.pt"


def experiment(*args):
    command, module, *rest = arguments(*args)
    return commands.run(f"{command} {module}", *rest, check=False)


def perplexities(out):
    content = json.loads((out / "results.json").read_text())
    return {run["name"]: [row["perplexity"] for row in run["sweep"]] for run in content["runs"]}


def test_trains_evaluates_and_reports(file, data, tmp_path):
    """Two at a time; one fails, the other's results are there; once more: only what is missing."""
    stock = {**dict.fromkeys(("moe-expert-count",)), "task": "language_modeling", "criterion": "cross_entropy"}
    runs = {
        "dense": {**stock, "arch": "transformer_lm", "max-update": 3},
        "smoe": {"moe-router": "smoe", "max-update": 3},
        "bad": {"adaptive-softmax-cutoff": 99999, "max-update": 3},  # which takes the data to be found wrong
    }
    out = tmp_path / "out"
    result = experiment(file(runs), data, out, "--jobs", "2")
    assert result.code == 1 and "Traceback" not in result.log
    assert "bad, seed 1: fairseq-train: error: --adaptive-softmax-cutoff 99999: must be growing numbers" in result.err
    found = perplexities(out)
    assert set(found) == {"dense", "smoe"} and len(found["smoe"]) == 2
    for run in json.loads((out / "results.json").read_text())["runs"]:
        (record,) = run["trained_by"]
        assert record["cpu"] is True and record["torch"] == torch.__version__
    assert f"torch {torch.__version__}; version " in result.out
    assert f"wrote {out}/results.png" in result.out and re.search(r"\|  *smoe \|", result.out)
    before = (out / "smoe-seed1" / "checkpoint_last.pt").stat().st_mtime
    del runs["bad"]
    again = experiment(file(runs), data, out, "--against", "dense")
    assert again.code == 0 and perplexities(out) == found
    assert "Against dense, in % of its perplexity" in (out / "results.md").read_text()
    assert (out / "smoe-seed1" / "checkpoint_last.pt").stat().st_mtime == before

    one = experiment(file(runs), data, out, "--row", "smoe")
    assert one.code == 0 and perplexities(out) == {"smoe": found["smoe"]} and "dense" not in one.out
    no_row = experiment(file(runs), data, out, "--row", "moe")
    assert no_row.code == 1 and no_row.last_line.endswith(f"--row moe: {file(runs)} has the rows dense / smoe")
    left_out = experiment(file(runs), data, out, "--row", "smoe", "--against", "dense")
    assert left_out.code == 1 and left_out.last_line.endswith("--against dense: is left out by --row, add --row dense")
    unknown = experiment(file(runs), data, out, "--against", "smo")
    assert unknown.code == 1 and unknown.last_line.endswith(f"--against smo: {file(runs)} has the rows dense / smoe")

    runs["smoe"]["lr-schedular"] = "cosine"
    misspelt = experiment(file(runs), data, out)
    assert misspelt.code == 1
    assert misspelt.last_line.endswith(
        "tiny.yaml: runs: smoe: --lr-schedular: fairseq-train has no such option, --lr-scheduler?"
    )
    runs["smoe"] = {"moe-router": "best", "max-update": 3}
    unknown = experiment(file(runs), data, out)
    assert unknown.code == 1 and "tiny.yaml: runs: smoe: --moe-router 'best': choose from" in unknown.last_line
    runs["smoe"] = {"moe-router": "smoe", "max-update": 3}
    nowhere = experiment(file(runs, evaluation={"split": "tset"}), data, out)
    assert nowhere.code == 1 and nowhere.last_line.endswith("tset.idx; fairseq-preprocess makes it")
    runs["smoe"]["lr"] = 0.5
    refused = experiment(file(runs), data, out)
    assert refused.code == 1 and "smoe-seed1: holds a run with other options (--lr 0.01, --lr 0.5)" in refused.last_line


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM, signal.SIGINT], ids=str)
def test_goes_on_after_a_kill(file, data, tmp_path, undisturbed, number):
    """A training that outlives its runner is waited for; the model is that of an experiment nobody disturbed."""
    path, out = file(), tmp_path / "out"
    process = popen(*_split(arguments(path, data, out)), preexec_fn=_heed_interrupts)
    until = time.monotonic() + 300
    while not list((out / "smoe-seed1").glob("checkpoint_1_*.pt")):
        assert time.monotonic() < until and process.poll() is None
        time.sleep(0.02)
    process.send_signal(number)
    assert process.wait(timeout=30) != 0
    assert not (out / "smoe-seed1" / "logged.json").exists()
    assert experiment(path, data, out).code == 0
    log = (out / "smoe-seed1" / "train.log").read_text()
    assert ("Loaded checkpoint" in log) == (number != signal.SIGKILL)
    expected, checkpoint = undisturbed
    assert perplexities(out) == expected
    models = [load(path)["model"] for path in (out / "smoe-seed1" / "checkpoint_last.pt", checkpoint)]
    assert all((models[0][name] == models[1][name]).all() for name in models[0])


def test_evaluated_anew_where_it_is_evaluated_otherwise(file, data, tmp_path):
    out, runs = tmp_path / "out", {"smoe": {"moe-router": "smoe", "max-update": 3}}
    found = []
    for changes in ({}, {"at": [1, 2]}, {"at": [1, 2], "evaluation": {"context-window": 8}}):
        assert experiment(file(runs, **changes), data, out).code == 0
        found.append(perplexities(out)["smoe"])
    assert found[0][0] == found[1][0] != found[2][0] and found[0][1] != found[1][1]
    assert (out / "smoe-seed1" / "train.log").read_text().count("done training") == 1


def _heed_interrupts():
    """Where the tests run in a shell's background SIGINT is ignored, by whatever they start too."""
    signal.signal(signal.SIGINT, signal.default_int_handler)


def _split(arguments):
    return [" ".join(arguments[:2]), *arguments[2:]]
