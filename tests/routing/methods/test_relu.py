import torch

from fairseq_hyperrouter import MoELayer, RoutingContext
from fairseq_hyperrouter.routing import ReluRouter, totals
from tests.reference import feed_forward


def test_outputs_and_loss():
    torch.manual_seed(0)
    layer = MoELayer(ReluRouter(6, 4, init_std=1.0, loss_weight=0.5), 8, top_k=2).double()
    x = torch.randn(9, 6).double()
    y, routing = layer(x)
    gates = (x @ layer.router.weight.t() + layer.router.bias).clamp(min=0)
    expected = torch.zeros_like(x)
    for t in range(9):
        for expert in range(4):
            weights = [getattr(layer.experts, name)[expert] for name in ("weight1", "bias1", "weight2", "bias2")]
            expected[t] += gates[t, expert] * feed_forward(x[t], *weights)
    torch.testing.assert_close(y, expected)
    load = (gates > 0).sum(0)
    assert torch.equal(totals.expert_load(routing), load.float())
    share = load.double() / 9 * 4 / 2
    torch.testing.assert_close(routing.loss, 0.5 * (share * gates).sum(1).mean())


def test_at_most_k_experts_outside_training():
    router = ReluRouter(6, 4, init_std=1.0).eval()
    routing = router(torch.randn(50, 6), RoutingContext(2))
    assert routing.expert_index.shape == (50, 2) and routing.loss is None
    assert torch.equal(routing.chosen, routing.gate > 0) and routing.chosen.sum() < 100


def test_padding_changes_no_loss():
    router, x = ReluRouter(6, 4, init_std=1.0, loss_weight=1.0), torch.randn(6, 6)
    padded = router(x, RoutingContext(2, torch.arange(6) > 2)).loss
    torch.testing.assert_close(padded, router(x[:3], RoutingContext(2)).loss)


def test_the_penalty_follows_the_sparsity():
    router = ReluRouter(6, 4)
    router(torch.randn(5, 6), RoutingContext(2))
    for load, steps in (([30.0, 30, 30, 30], 1), ([30.0, 30, 30, 30], 2), ([10.0, 10, 10, 10], 1), ([25.0] * 4, 1)):
        router.after_update(torch.tensor(load), torch.tensor(50.0))
        assert router.steps.item() == steps
    router.after_update(torch.zeros(4), torch.tensor(0.0))  # LayerDrop left the layer out
    assert router.steps.item() == 1
