"""Runs that cannot be trained or evaluated are found before the first training."""

import dataclasses

import pytest

from fairseq_hyperrouter import UserError
from fairseq_hyperrouter.experiments import check_run, read_experiment
from fairseq_hyperrouter.experiments.experiment import read_content
from tests.commands import REPO

FILES = sorted(path for path in REPO.joinpath("examples").glob("*/*.yaml") if "runs" in path.read_text())
SETTINGS = [(path, setting) for path in FILES for setting in read_content(path)["settings"]]


@pytest.mark.parametrize("path, setting", SETTINGS, ids=lambda value: getattr(value, "stem", value))
def test_every_run_of_the_examples(path, setting):
    experiment = read_experiment(path, setting, [1])
    for run in experiment.runs:
        check_run(run.name, run, experiment, "data")


@pytest.mark.parametrize(
    "at, evaluation, message",
    [
        ((1, 32), (), r"a place: at 32: must be at most moe-expert-count \(16\)"),
        (
            (1,),
            ("--tokens-per-sample", "129"),
            "a place: evaluation: tokens-per-sample 129: the model takes at ",
        ),
        (
            (1,),
            ("--context-window", "128"),
            "a place: evaluation: context-window 128: must be below tokens-",
        ),
    ],
)
def test_mistakes(at, evaluation, message):
    experiment = read_experiment(REPO / "examples" / "elastic" / "one_model.yaml")
    run = dataclasses.replace(experiment.runs[0], at=at)
    with pytest.raises(UserError, match=message):
        check_run("a place", run, dataclasses.replace(experiment, evaluation=evaluation), "data")
