import torch

from fairseq_hyperrouter import FixedRouter, LinearRouter, RoutingContext


def test_nothing_is_trained_and_everything_is_saved():
    router = FixedRouter(8, 4)
    assert not list(router.parameters())
    assert {name: tuple(b.shape) for name, b in router.state_dict().items()} == {"weight": (4, 8), "bias": (4,)}
    assert router.weight.any() and router.bias.any()


def test_same_weights_as_the_linear_router_of_the_same_seed():
    fixed, linear = FixedRouter(8, 4), LinearRouter(8, 4)
    for router in (fixed, linear):
        router.reset_parameters(torch.Generator().manual_seed(3))
    x = torch.randn(5, 8)
    assert torch.equal(fixed(x, RoutingContext(2)).logits, linear(x, RoutingContext(2)).logits)


def test_gradient_reaches_the_tokens():
    x = torch.randn(5, 8, requires_grad=True)
    FixedRouter(8, 4)(x, RoutingContext(2)).gate.square().sum().backward()
    assert x.grad.any()
