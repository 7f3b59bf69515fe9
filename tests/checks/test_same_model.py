"""What a checkpoint was made with, beside what the command says."""

import argparse
import logging

import pytest
import torch

from fairseq_hyperrouter import UserError
from fairseq_hyperrouter.checks.same_model import check_same_model, shape_difference
from fairseq_hyperrouter.models.transformer_lm import HyperRouterLanguageModelConfig
from fairseq_hyperrouter.routing import ROUTERS
from tests.tiny import tiny_model


def options(**changes):
    config = vars(HyperRouterLanguageModelConfig(decoder_embed_dim=16, decoder_layers=2, moe_expert_count=4))
    found = argparse.Namespace(**{"decoder_input_dim": 16, "decoder_output_dim": 16, **config, **changes})
    found._name = "transformer_lm_hyperrouter"
    return found


@pytest.fixture
def saved(tmp_path):
    """saved(**options) -> a checkpoint that was trained with them."""

    def save(**changes):
        path = tmp_path / "checkpoint.pt"
        torch.save({"model": {}, "cfg": {"model": vars(options(**changes))}}, path)
        return path

    return save


@pytest.mark.parametrize("router, default", [("cosine", 16), ("stable", 50), ("recurrent", 128)])
def test_a_default_that_is_spelled_out(saved, router, default):
    given = {"moe_router": router, "moe_top_k": 1}
    path = saved(**given)
    check_same_model(path, options(**given))
    check_same_model(path, options(**given, moe_router_dim=default))
    with pytest.raises(UserError, match=f"--moe-router-dim: .* was made with {default}, this command says 8"):
        check_same_model(path, options(**given, moe_router_dim=8))


def test_a_router_of_ones_own(saved, monkeypatch):
    """Which hands options on to the one that it is made from; or which is not known to this command."""

    class Mine(ROUTERS["cosine"]):
        def __init__(self, *sizes, mine=1, **given):
            super().__init__(*sizes, **given)

    monkeypatch.setitem(ROUTERS, "mine", Mine)
    path = saved(moe_router="mine")
    check_same_model(path, options(moe_router="mine"))
    check_same_model(path, options(moe_router="mine", moe_router_dim=16))
    monkeypatch.delitem(ROUTERS, "mine")
    with pytest.raises(UserError, match=r"--moe-router: .* was made with mine, this command says smoe"):
        check_same_model(path, options(moe_router="smoe"))


def test_goes_on_with_another_meaning(saved, caplog):
    """What can be learned anew is allowed, and said."""
    path = saved(moe_gate_softmax="all")
    with caplog.at_level(logging.WARNING):
        check_same_model(path, options(activation_fn="gelu"))
    assert [record.message.partition(":")[0] for record in caplog.records] == ["--moe-gate-softmax", "--activation-fn"]
    caplog.clear()
    check_same_model(path, options(moe_gate_softmax="all"))
    assert not caplog.records


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"moe_router": "smo", "moe_top_k_schedule": "elastic"}, "--moe-router 'smo': choose from"),
        ({"moe_freq": 0}, "--moe-freq 0: must be at least 1"),
    ],
)
def test_options_that_make_no_model(saved, changes, message):
    with pytest.raises(UserError, match=message):
        check_same_model(saved(), options(**changes))


def test_loss_free_balancing(saved):
    """Its bias is in the checkpoint or is not; the rate may change."""
    check_same_model(saved(moe_loss_free_rate=0.1), options(moe_loss_free_rate=0.2))
    for before, now in ((0.1, 0.0), (0.0, 0.1)):
        with pytest.raises(UserError, match=f"--moe-loss-free-rate: .* with {before}, this command says {now}"):
            check_same_model(saved(moe_loss_free_rate=before), options(moe_loss_free_rate=now))
    states = {rate: tiny_model(moe_loss_free_rate=rate, moe_router="smoe").state_dict() for rate in (0.0, 0.1)}
    expected = "--moe-loss-free-rate: 0 in the checkpoint, above 0 in the model"
    assert shape_difference(states[0.0], states[0.1]) == expected
    other = tiny_model(moe_loss_free_rate=0.1, moe_router="cosine").state_dict()
    said = shape_difference(states[0.1], other)
    assert " or smoe or " in said and said.endswith("in the checkpoint, cosine in the model")
