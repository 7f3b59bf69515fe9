import pytest
import torch

from fairseq_hyperrouter import LinearRouter, RoutingContext


def test_z_is_x_w_plus_b():
    router = LinearRouter(8, 4)
    x = torch.randn(5, 8)
    torch.testing.assert_close(router(x, RoutingContext(2)).logits, x @ router.weight.t() + router.bias)


def test_weight_and_bias_are_trained():
    router = LinearRouter(8, 4)
    assert {name: tuple(p.shape) for name, p in router.named_parameters()} == {"weight": (4, 8), "bias": (4,)}
    assert not list(router.buffers())


@pytest.mark.parametrize("init_std, expected", [(None, 0.02), (0.5, 0.5)])
def test_init_std(init_std, expected):
    router = LinearRouter(256, 256, init_std=init_std)
    assert router.weight.std().item() == pytest.approx(expected, rel=0.02)
    assert router.bias.std().item() == pytest.approx(expected, rel=0.2)
