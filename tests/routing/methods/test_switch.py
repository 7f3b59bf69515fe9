import pytest
import torch

from fairseq_hyperrouter import RoutingContext, UserError
from fairseq_hyperrouter.config import MoEConfig
from fairseq_hyperrouter.routing import Place, SwitchRouter


@pytest.mark.parametrize("from_options", [True, False])
def test_gates_are_probabilities_of_the_full_softmax(from_options):
    config = MoEConfig(moe_expert_count=5, moe_router_init_std=1.0)
    router = SwitchRouter.from_config(config, Place(8)) if from_options else SwitchRouter(8, 5, init_std=1.0)
    routing = router(torch.randn(20, 8), RoutingContext(1))
    torch.testing.assert_close(routing.gate[:, 0], routing.logits.softmax(-1).max(-1).values)
    routing.gate.sum().backward()
    assert router.weight.grad.any()  # at one expert per token, too


def test_other_gates_are_refused():
    with pytest.raises(UserError, match="gate_softmax 'selected': choose from all"):
        SwitchRouter(8, 5, gate_softmax="selected")
