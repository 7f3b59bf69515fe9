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
    """Of the second layer's logits alone, also when the layer is computed twice by activation checkpointing."""
    for checkpointing in (False, True):
        model = tiny_model(moe_router="recurrent", moe_router_dim=6, checkpoint_activations=checkpointing)
        routing = model(**tiny_sample()["net_input"])[1]["routing"]
        first, second = (layer.moe.router for layer in model.decoder.layers)
        assert first.cell is second.cell
        (gradient,) = torch.autograd.grad(routing[0].state.sum(), routing[0].state, retain_graph=True)
        assert gradient.any()
        routing[1].logits.square().sum().backward()
        assert (first.projection.grad.any() and first.weight.grad is None) or not first.weight.grad.any()
