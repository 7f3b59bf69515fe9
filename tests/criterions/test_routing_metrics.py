from functools import partial
from statistics import fmean

import pytest
import torch
from fairseq.logging import metrics

from fairseq_hyperrouter.criterions.routing_metrics import log_routing, routing_sums
from fairseq_hyperrouter.routing import Routing
from tests import reference
from tests.tiny import tiny_model, tiny_sample

MEANS = 6
"""How many metrics are logged without --moe-log-layers."""
ROUTERS = [
    {"moe_router": "hyperrouter", "moe_top_k": 2},
    {"moe_router": "relu", "moe_top_k": 3},  # tokens have different numbers of experts
    {"moe_router": "smoe", "moe_top_k": 2, "moe_loss_free_rate": 0.5},
    {"moe_router": "hyperrouter", "moe_top_k": 4},  # all
]


def routed(sample, **options):
    """The Routings of a model in evaluation, and which of their tokens are padding; both are time-major."""
    model = tiny_model(**options).eval()
    for layer in model.decoder.layers:
        if layer.moe.router.loss_free_rate:
            layer.moe.router.balancing_steps.copy_(torch.arange(4))
    with torch.no_grad():
        routings = model(**sample["net_input"])[1]["routing"]
    return routings, sample["target"].t().reshape(-1) == 1


def sums(routings, per_layer=False):
    return routing_sums(routings, 4, torch.device("cpu"), per_layer)


def reduced(outputs):
    with metrics.aggregate(new_root=True) as aggregator:
        log_routing(outputs)
    return aggregator.get_smoothed_values()


def test_means_over_layers():
    routings, padding = routed(tiny_sample(), moe_top_k=2)
    metric = reduced([sums(routings)])
    balance, entropy = (reference.of_layers(f, routings, padding) for f in (reference.balance_loss, reference.entropy))
    assert len(metric) == MEANS
    assert metric["moe_top_k"] == 2
    assert metric["moe_balance_loss"] == pytest.approx(fmean(balance), abs=1e-3)
    assert metric["moe_router_entropy"] == pytest.approx(fmean(entropy), abs=1e-3)
    assert metric["moe_dropped"] == 0
    loads = [r.expert_index[~padding].flatten().bincount(minlength=4) for r in routings]
    assert metric["moe_load_imbalance"] == pytest.approx(sum(n.max() * 4 / 28 for n in loads).item() / 2, abs=0.01)
    assert metric["moe_unused_experts"] == sum((n == 0).sum() for n in loads).item() / 2


@pytest.mark.parametrize("options", ROUTERS)
def test_metrics_per_layer(options):
    """The means of six are what is logged without; all are those of the equations."""
    routings, padding = routed(tiny_sample(), **options)
    metric, mean = reduced([sums(routings, per_layer=True)]), reduced([sums(routings)])
    for name in mean:
        of_layers = [metric[f"{name}_layer{layer}"] for layer in range(len(routings))]
        assert metric[name] == mean[name] == pytest.approx(fmean(of_layers), abs=0.01)
    for name, function in (
        ("balance_loss", reference.balance_loss),
        ("router_entropy", reference.entropy),
        ("normalised_entropy", reference.normalised_entropy),
        ("load_cv", reference.load_cv),
        *((f"load_expert{expert}", partial(reference.load_share, expert)) for expert in range(4)),
        ("inner_balance", reference.inner_balance),
        ("outer_balance", reference.outer_balance),
        ("margin", reference.margin),
    ):
        for layer, value in enumerate(reference.of_layers(function, routings, padding)):
            assert metric[f"moe_{name}_layer{layer}"] == pytest.approx(value, abs=1e-3), name
    assert len(metric) == MEANS + len(routings) * (MEANS + 9)


def test_dropped_share():
    model = tiny_model(moe_capacity_factor=0.5, moe_top_k=4)
    routings = model(**tiny_sample()["net_input"])[1]["routing"]
    assert reduced([sums(routings)])["moe_dropped"] == 0.5  # every expert is chosen 14 times and takes 7


def test_tokens_without_an_expert():
    """As a relu router may have them: none per token, no load, nothing dropped."""
    nobody = Routing(
        torch.zeros(5, 4), torch.zeros(5, 1, dtype=torch.long), torch.zeros(5, 1), chosen=torch.zeros(5, 1) > 0
    )
    metric = reduced([sums([nobody], per_layer=True)])
    assert metric["moe_top_k"] == metric["moe_top_k_layer0"] == metric["moe_load_expert3_layer0"] == 0
    assert metric["moe_dropped"] == 0 and metric["moe_unused_experts"] == 4


def test_one_expert():
    """It has all the load, and a router of one is never undecided."""
    alone = Routing(torch.randn(5, 1), torch.zeros(5, 1, dtype=torch.long), torch.ones(5, 1))
    metric = reduced([routing_sums([alone], 1, torch.device("cpu"), per_layer=True)])
    assert metric["moe_load_expert0_layer0"] == metric["moe_load_imbalance"] == 1
    assert metric["moe_normalised_entropy_layer0"] == metric["moe_load_cv_layer0"] == 0


def test_layers_left_out_count_nowhere():
    (_, routing), _ = routed(tiny_sample())
    output, partial = sums([routing, routing]), sums([None, routing])
    for name in (name for name in output if name.startswith("moe_")):
        assert not partial[name][0].any()
        torch.testing.assert_close(partial[name][1], output[name][1])
    assert (partial["n_moe_layers"], output["n_moe_layers"]) == (1, 2)
    assert reduced([partial]) == pytest.approx(reduced([sums([routing])]))
    of_layers = reduced([sums([None, routing], per_layer=True)])
    assert "moe_top_k_layer1" in of_layers and "moe_top_k_layer0" not in of_layers
    assert not reduced([sums([None, None])])
