import torch

from fairseq_hyperrouter import RoutingContext
from fairseq_hyperrouter.routing import GShardRouter


def test_the_second_expert_is_drawn_by_its_probability():
    torch.manual_seed(0)
    router = GShardRouter(4, 4)
    with torch.no_grad():
        router.weight.zero_()
        router.bias.copy_(torch.tensor([3.0, 0.0, 2.0, 1.0]))
    routing = router(torch.randn(40_000, 4), RoutingContext(2))
    assert (routing.expert_index[:, 0] == 0).all()
    frequency = routing.expert_index[:, 1].bincount(minlength=4) / 40_000
    torch.testing.assert_close(frequency[1:], torch.tensor([0.0, 2.0, 1.0]).softmax(0), rtol=0, atol=0.01)
    torch.testing.assert_close(routing.gate.sum(-1), torch.ones(40_000))
    three = router(torch.randn(100, 4), RoutingContext(3)).expert_index
    assert all(len(set(row)) == 3 for row in three.tolist())


def test_outside_training_nothing_is_drawn():
    router = GShardRouter(4, 4).eval()
    routing = router(torch.randn(50, 4), RoutingContext(2))
    assert torch.equal(routing.expert_index, routing.logits.topk(2).indices)


def test_loss_free_balancing_moves_the_second_expert_too():
    router = GShardRouter(4, 4, loss_free_rate=0.1)
    router.balancing_steps += torch.tensor([0, 0, -200, -200])
    experts = router(torch.randn(500, 4), RoutingContext(2)).expert_index
    assert set(experts.flatten().tolist()) == {0, 1}
