"""What an experiment's file may say."""

import pytest
import yaml

from fairseq_hyperrouter.errors import UserError
from fairseq_hyperrouter.experiments import read_experiment
from fairseq_hyperrouter.experiments.experiment import as_arguments

CONTENT = {
    "title": "Routers",
    "metric": "bits_per_character",
    "at": [1, 2],
    "options": {"task": "hyperrouter", "lr": 0.1, "max-update": 10, "cpu": True},
    "runs": {
        "SMoE": {"moe-router": "smoe"},
        "Hyper (k = 1)": {"moe_router": "hyperrouter", "lr": None, "row": "specialists", "at": [1]},
    },
    "settings": {
        "small": {"data": "data-bin/small", "seeds": [1, 2], "options": {"max-update": 5}},
        "large": None,
    },
    "evaluation": {"batch-size": 4},
}


def written(tmp_path, **changes):
    path = tmp_path / "some.yaml"
    path.write_text(yaml.safe_dump({**CONTENT, **changes}, sort_keys=False))
    return path


def test_runs(tmp_path):
    """A run's options go before a setting's, and those before the shared ones; one run per seed."""
    experiment = read_experiment(written(tmp_path))
    assert (experiment.setting, experiment.metric, experiment.data) == ("small", "bits_per_character", "data-bin/small")
    assert experiment.evaluation == ("--batch-size", "4")
    smoe, smoe2, hyper, _ = experiment.runs
    assert (smoe.name, smoe.row, smoe.seed, smoe.at, smoe.updates) == ("SMoE", "SMoE", 1, (1, 2), 5)
    shared = ("--task", "hyperrouter", "--lr", "0.1", "--max-update", "5", "--cpu")
    assert smoe.options == smoe2.options == (*shared, "--moe-router", "smoe")
    assert (hyper.row, hyper.at, hyper.folder) == ("specialists", (1,), "hyper-k-1-seed1")
    assert hyper.options == ("--task", "hyperrouter", "--max-update", "5", "--cpu", "--moe-router", "hyperrouter")
    large = read_experiment(written(tmp_path), "large", seeds=[7])
    assert [(run.seed, run.updates) for run in large.runs] == [(7, 10), (7, 10)]


def test_only_some_rows(tmp_path):
    """By the row's name, which is not that of its runs."""
    more = {**CONTENT["runs"], "Hyper (k = 2)": {"row": "specialists", "at": [2]}}
    experiment = read_experiment(written(tmp_path, runs=more), seeds=[1])
    assert experiment.rows == ("SMoE", "specialists")
    assert [run.name for run in experiment.only(["specialists"]).runs] == ["Hyper (k = 1)", "Hyper (k = 2)"]
    assert experiment.only(experiment.rows) == experiment and not experiment.only(["Hyper (k = 1)"]).runs


def test_based_on_another(tmp_path):
    """All but the runs is the other's, at every depth, where this one does not say otherwise."""
    (tmp_path / "base.yaml").write_text(yaml.safe_dump(CONTENT, sort_keys=False))
    path = tmp_path / "some.yaml"
    own = {"options": {"lr": None, "amp": True}, "settings": {"small": {"seeds": [3]}, "large": None, "huge": None}}
    based = {"based_on": "base.yaml", "title": "More", "at": [4], "runs": {"one": {}}, **own}
    path.write_text(yaml.safe_dump(based))
    small = read_experiment(path)
    assert (small.title, small.metric, small.data) == ("More", "bits_per_character", "data-bin/small")
    assert small.evaluation == ("--batch-size", "4")
    (run,) = small.runs
    assert (run.name, run.seed, run.at, run.updates) == ("one", 3, (4,), 5)
    assert run.options == ("--task", "hyperrouter", "--max-update", "5", "--cpu", "--amp")
    assert [read_experiment(path, setting).runs[0].updates for setting in ("large", "huge")] == [10, 10]

    path.write_text(yaml.safe_dump({**based, "based_on": "some.yaml"}))
    with pytest.raises(UserError, match=r"some.yaml: based_on some.yaml: is itself based on another"):
        read_experiment(path)
    path.write_text(yaml.safe_dump({**based, "based_on": "none.yaml"}))
    with pytest.raises(UserError, match=r"none.yaml: no such file"):
        read_experiment(path)
    path.write_text(yaml.safe_dump({**based, "options": [1]}))
    with pytest.raises(UserError, match=r"some.yaml: options: must be names with values"):
        read_experiment(path)


def test_as_arguments():
    assert as_arguments({"lr": 0.1, "cpu": True, "bf16": None, "amp": False}) == ("--lr", "0.1", "--cpu")


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"titel": "x"}, r"titel: no such entry, choose from at, based_on, checkpoint, evaluation"),
        ({"runs": ["a"]}, r"runs: must be names with values"),
        ({"metric": "loss"}, r"metric loss: choose from perplexity, bits_per_character, bits_per_token"),
        ({"at": 3}, r"at 3: must be a list of whole numbers"),
        ({"at": []}, r"at \[\]: must be a list"),
        ({"at": [0]}, r"at \[0\]: must be a list of whole numbers from 1 on"),
        ({"runs": {"a": {"at": [-1]}}}, r"runs: a: at \[-1\]: must be a list of whole numbers from 1 on"),
        ({"runs": {}}, r"runs: names none"),
        ({"settings": {}}, r"settings: names none"),
        ({"settings": {"a": {"data": 5}}}, r"settings: a: data 5: must be a folder's name"),
        ({"evaluation": {"batch-size": 0}}, r"evaluation: batch-size 0: must be a whole number, at least 1"),
        (
            {"evaluation": {"context-window": "no"}},
            r"context-window no: must be a whole number, at least 0",
        ),
        (
            {"checkpoint": "best", "options": {"max-update": 1, "disable-validation": True}},
            r"runs: SMoE: disable-validation: saves no checkpoint_best.pt",
        ),
        ({"logged": "train_wps"}, r"logged train_wps: must be a list of names"),
        ({"logged": [3]}, r"logged \[3\]: must be a list of names"),
        ({"options": {"seed": 3}}, r"options: seed: is the runner's to give"),
        ({"options": {"log_format": "simple"}}, r"options: log_format: is the runner's to give"),
        ({"options": {"lr": [1]}}, r"options: lr: must be one value"),
        ({"options": {"max-update": 1, "max_update": 2}}, r"options: max_update: is there twice"),
        ({"options": {"max-update": 1, "no-save": True}}, r"runs: SMoE: no-save: saves no checkpoint_last.pt"),
        ({"at": [1, 1]}, r"at \[1, 1\]: names a number twice"),
        ({"options": {}, "settings": {"a": {}}}, r"runs: SMoE: max-update None: must be a number of updates"),
        ({"runs": {"a b": {}, "A-B": {}}}, r"runs: A-B: a b has the same folder, a-b-seed1, rename one"),
        ({"evaluation": {"top-p": 0.5}}, r"evaluation: top-p: no such entry, choose from batch-size, context-window, "),
        ({"evaluation": [3]}, r"evaluation: must be names with values"),
        (
            {"runs": {"a": {"row": "r"}, "b": {"row": "r", "at": [2, 4]}}},
            r"runs: b: row r has k = 2 of a already, give both an at of their own",
        ),
        ({"runs": {"a": {"row": None}}}, r"runs: a: row None: must be a text"),
        ({"title": ""}, r"title : must be a text"),
        ({"evaluation": {"split": True}}, r"evaluation: split True: must be a text"),
        ({"evaluation": {"split": ""}}, r"evaluation: split : must be a text"),
        ({"settings": {"a": {"sedes": [1]}}}, r"settings: a: sedes: no such entry, choose from data"),
    ],
    ids=str,
)
def test_mistakes(tmp_path, changes, message):
    with pytest.raises(UserError, match=message):
        read_experiment(written(tmp_path, **changes))


def test_mistakes_in_seeds(tmp_path):
    with pytest.raises(UserError, match=r"some.yaml: --seeds \[-1\]: must be a list of whole numbers from 0 on"):
        read_experiment(written(tmp_path), seeds=[-1])


def test_mistakes_about_the_file(tmp_path):
    with pytest.raises(UserError, match=r"--setting huge: .*some.yaml has small, large"):
        read_experiment(written(tmp_path), "huge")
    with pytest.raises(UserError, match=r"no.yaml: no such file"):
        read_experiment(tmp_path / "no.yaml")
    path = written(tmp_path)
    path.write_text("a: [")
    with pytest.raises(UserError, match=r"some.yaml: is no YAML: while parsing"):
        read_experiment(path)
    path.write_text("title: x\ntitle: y")
    with pytest.raises(UserError, match=r"some.yaml: is no YAML: title is there twice"):
        read_experiment(path)
    path.write_text("[1]")
    with pytest.raises(UserError, match=r"some.yaml: must be names with values"):
        read_experiment(path)
    path.write_text("title: x")
    with pytest.raises(UserError, match=r"some.yaml: runs: is missing"):
        read_experiment(path)
