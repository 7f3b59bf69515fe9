"""The README says what the code says."""

import dataclasses
import re
from pathlib import Path

import pytest
from fairseq.tasks.language_modeling import LanguageModelingConfig

from fairseq_hyperrouter.config import MoEConfig
from fairseq_hyperrouter.criterions.routing_losses import RoutingLossConfig
from fairseq_hyperrouter.tasks.hyperrouter import HyperRouterTaskConfig

README = Path(__file__).parents[1].joinpath("README.md").read_text(encoding="utf-8")


def options():
    stock = {field.name for field in dataclasses.fields(LanguageModelingConfig)}
    for config in (MoEConfig, RoutingLossConfig, HyperRouterTaskConfig):
        for field in dataclasses.fields(config):
            if "help" in field.metadata and field.name not in stock:
                yield field


@pytest.mark.parametrize("field", list(options()), ids=lambda field: field.name)
def test_every_option_is_listed_with_its_default_and_help(field):
    default = "" if field.default is None or str(field.default).startswith("${") else field.default
    default = "off" if default is False else default
    assert f"| `--{field.name.replace('_', '-')}` | {default} | {field.metadata['help']} |" in README


def test_no_option_is_listed_that_does_not_exist():
    listed = set(re.findall(r"^\| `--([a-z0-9-]+)` \|", README, flags=re.MULTILINE))
    assert listed == {field.name.replace("_", "-") for field in options()}


def test_python_example_runs():
    example = re.search(r"```python\n(.*?)\nlm = ", README, flags=re.DOTALL)[1]
    names = {}
    exec(example, names)
    assert names["y"].shape == (3, 5, 64)
    assert names["routing"].expert_index.shape == (15, 8)
