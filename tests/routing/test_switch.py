import torch

from fairseq_hyperrouter import RoutingContext
from fairseq_hyperrouter.config import MoEConfig
from fairseq_hyperrouter.routing import Place, SwitchRouter


def test_gates_are_probabilities_of_the_full_softmax():
    router = SwitchRouter.from_config(MoEConfig(moe_expert_count=5, moe_router_init_std=1.0), Place(8))
    routing = router(torch.randn(20, 8), RoutingContext(1))
    torch.testing.assert_close(routing.gate[:, 0], routing.logits.softmax(-1).max(-1).values)
    routing.gate.sum().backward()
    assert router.weight.grad.any()  # at one expert per token, too
