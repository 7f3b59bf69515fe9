"""The files of experiments are ones that fairseq-train takes."""

import pytest
import yaml
from fairseq import options
from fairseq.dataclass.utils import convert_namespace_to_omegaconf

from fairseq_hyperrouter.config import MoEConfig
from fairseq_hyperrouter.experiments import read_experiment
from fairseq_hyperrouter.experiments.experiment import read_content
from fairseq_hyperrouter.routing import ROUTERS
from tests.commands import REPO, USER_DIR

FILES = sorted(REPO.joinpath("examples").glob("*/*.yaml"))
SETTINGS = [(file, setting) for file in FILES for setting in read_content(file)["settings"]]


@pytest.mark.parametrize("file, setting", SETTINGS, ids=lambda value: getattr(value, "stem", value))
def test_options(file, setting):
    """Every run's options are parsed by stock fairseq and fit together."""
    experiment = read_experiment(file, setting)
    for run in experiment.runs:
        if run.seed != experiment.runs[0].seed:
            continue
        arguments = ["data", "--user-dir", str(USER_DIR), *run.options]
        cfg = convert_namespace_to_omegaconf(options.parse_args_and_arch(options.get_training_parser(), arguments))
        assert cfg.optimization.max_update == run.updates
        if cfg.model._name == "transformer_lm_hyperrouter":
            MoEConfig.from_namespace(cfg.model).check(cfg.model.decoder_layers)
            assert max(run.at) <= cfg.model.moe_expert_count


def test_every_router_is_compared():
    runs = yaml.safe_load(REPO.joinpath("examples/methods/routers.yaml").read_text())["runs"].values()
    assert {run["moe-router"] for run in runs} == {name for name, router in ROUTERS.items() if not router.looks_ahead}
