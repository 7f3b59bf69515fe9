from types import SimpleNamespace

import pytest

from fairseq_hyperrouter import MoEConfig, UserError
from fairseq_hyperrouter.checks.moe_options import (
    check_average,
    check_backend_here,
    check_routing_parts,
    warn_of_untaught_routers,
)
from tests.tiny import ADAPTIVE, tiny_model


@pytest.mark.parametrize(
    "options, warns",
    [
        ({"moe_top_k": 1}, True),
        ({"moe_top_k": 1, "moe_router": "smoe"}, True),
        ({"moe_top_k": 2}, False),
        ({"moe_top_k": 1, "moe_gate_softmax": "all"}, False),
        (
            {"moe_top_k": 1, "moe_top_k_schedule": "linear", "moe_top_k_start": 2, "moe_top_k_schedule_updates": 9},
            False,
        ),
        ({"moe_router": "switch", "moe_top_k": 1}, False),
        ({"moe_router": "smoe-dropout", "moe_top_k": 1}, False),  # is not trained at all
        ({"moe_router": "compete", "moe_top_k": 1}, False),  # has a loss of its own
        ({"moe_layers": "none", "moe_top_k": 1}, False),
    ],
)
def test_warns_where_a_router_learns_nothing(caplog, options, warns):
    model = tiny_model(**options)
    caplog.clear()
    warn_of_untaught_routers(model)
    assert [record.message.split(":")[0] for record in caplog.records] == ["--moe-top-k 1"] * warns


@pytest.mark.parametrize(
    "options, message",
    [
        ({"moe_router": "smoe"}, None),
        ({"moe_router": "hyperrouter"}, None),
        ({"moe_router": "cosine"}, None),
        ({"moe_router": "hash"}, "--moe-router hash"),
        ({"moe_router": "relu"}, "--moe-router relu"),
        ({"moe_router": "stable", "moe_top_k": 1}, "--moe-router stable"),
        ({"moe_router": "smoe", "moe_loss_free_rate": 0.5}, "--moe-loss-free-rate 0.5"),
        (ADAPTIVE, "adaptive softmax"),
    ],
)
def test_an_average_of_weights(options, message):
    model = tiny_model(**options)
    own = {name: value for name, value in options.items() if name.startswith("moe_")}
    cfg = SimpleNamespace(ema=SimpleNamespace(store_ema=True), model=MoEConfig(**own))
    if message is None:
        check_average(cfg, model)
    else:
        with pytest.raises(UserError, match=f"--store-ema: not together with {message}, whose .* has no average"):
            check_average(cfg, model)
    cfg.ema.store_ema = False
    check_average(cfg, model)


def test_a_backend_without_its_device(monkeypatch):
    cfg = SimpleNamespace(common=SimpleNamespace(cpu=True), model=SimpleNamespace(moe_backend="triton"))
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    check_backend_here(cfg)
    monkeypatch.delenv("TRITON_INTERPRET")
    with pytest.raises(UserError, match="--moe-backend triton: needs a GPU, and computes on a cpu here; choose auto"):
        check_backend_here(cfg)
    cfg.model.moe_backend = "runs"
    check_backend_here(cfg)


@pytest.mark.parametrize(
    "options, warns",
    [
        ({"moe_top_k_schedule": "elastic"}, True),
        ({"moe_top_k_schedule": "elastic", "moe_router": "smoe"}, True),
        ({"moe_top_k_schedule": "elastic", "criterion": "moe_cross_entropy"}, False),
        ({"moe_top_k_schedule": "elastic", "moe_layers": "none"}, False),
        ({"moe_top_k_schedule": "constant"}, False),
    ],
)
def test_warns_where_the_criterion_cannot_distil(caplog, options, warns):
    """Elastic's default is no wish of the user's; a --moe-distill-wt of theirs is refused by fairseq's parser."""
    name = options.pop("criterion", "cross_entropy")
    criterion = SimpleNamespace(_name=name, **({"moe_distill_wt": None} if name == "moe_cross_entropy" else {}))
    cfg = SimpleNamespace(
        model=MoEConfig(moe_top_k=4, seed=1, max_update=9, moe_top_k_schedule_updates=0),
        criterion=criterion,
        optimization=SimpleNamespace(max_update=9),
    )
    for option, value in options.items():
        setattr(cfg.model, option, value)
    check_routing_parts(cfg, task=None)
    expected = ["--moe-top-k-schedule elastic: --criterion cross_entropy trains without distillation"] * warns
    assert [record.message.partition(",")[0] for record in caplog.records] == expected
