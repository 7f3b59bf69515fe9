import torch

from fairseq_hyperrouter import RoutingContext
from fairseq_hyperrouter.routing import RecurrentRouter
from tests.tiny import tiny_model, tiny_sample


def test_logits_are_of_the_shared_gru():
    lower = RecurrentRouter(6, 4, dim=5)
    upper = RecurrentRouter(6, 4, dim=5, cell=lower.cell)
    x = torch.randn(7, 6)
    first = lower(x, RoutingContext(2))
    second = upper(x + 1, RoutingContext(2, state=first.state))
    state = lower.cell(x @ lower.projection.t(), torch.zeros(7, 5))
    torch.testing.assert_close(first.state, state)
    state = lower.cell((x + 1) @ upper.projection.t(), state)
    torch.testing.assert_close(second.logits, state @ upper.weight.t() + upper.bias)


def test_the_gradient_reaches_lower_projections():
    """Of the second layer's logits, also when the layer is computed twice by activation checkpointing."""
    for checkpointing in (False, True):
        model = tiny_model(moe_router="recurrent", moe_router_dim=6, checkpoint_activations=checkpointing)
        routing = model(**tiny_sample()["net_input"])[1]["routing"]
        first, second = (layer.moe.router for layer in model.decoder.layers)
        assert first.cell is second.cell
        routing[1].logits.square().sum().backward()
        assert first.projection.grad.any()


def test_the_state_is_handed_on():
    """Without it the logits of the second layer would be others."""
    router, x = RecurrentRouter(6, 4, dim=5, init_std=1.0), torch.randn(7, 6)
    state = torch.randn(7, 5, requires_grad=True)
    with_state = router(x, RoutingContext(2, state=state)).logits
    assert not torch.allclose(with_state, router(x, RoutingContext(2)).logits)
    with_state.square().sum().backward()
    assert state.grad.any()
