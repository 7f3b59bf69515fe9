"""The files of experiments; that fairseq-train takes them is tested in checks/test_arguments.py."""

import yaml

from fairseq_hyperrouter.routing import ROUTERS
from tests.commands import REPO


def test_every_router_is_compared():
    runs = yaml.safe_load(REPO.joinpath("examples/methods/routers.yaml").read_text())["runs"].values()
    assert {run["moe-router"] for run in runs} == {name for name, router in ROUTERS.items() if not router.looks_ahead}
