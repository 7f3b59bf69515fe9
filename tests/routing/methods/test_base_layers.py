import torch

from fairseq_hyperrouter import RoutingContext
from fairseq_hyperrouter.routing import BaseLayersRouter


def test_every_expert_gets_the_same_number_of_tokens_in_training():
    router = BaseLayersRouter(6, 4, init_std=1.0)
    x, padding = torch.randn(23, 6) + 1, torch.arange(23) < 3
    routing = router(x, RoutingContext(1, padding))
    assert routing.expert_index[~padding].flatten().bincount(minlength=4).tolist() == [5, 5, 5, 5]
    torch.testing.assert_close(routing.gate, routing.logits.gather(1, routing.expert_index).sigmoid())
    routing.gate.sum().backward()
    assert router.weight.grad.any()
    greedy = router.eval()(x, RoutingContext(2))
    assert torch.equal(greedy.expert_index, greedy.logits.topk(2).indices)
    assert greedy.expert_index[:, 0].bincount(minlength=4).max() > 6
