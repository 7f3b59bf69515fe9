import pytest
import torch
from torch import nn
from torch.autograd import forward_ad

from fairseq_hyperrouter.models import linear as module
from fairseq_hyperrouter.models.linear import LEAST_OUTPUTS, LEAST_ROWS, Linear
from fairseq_hyperrouter.native.usable import has_native

compiled = pytest.mark.skipif(
    not has_native(), reason="no compiler, or a processor without AVX-512: torch's products do the work"
)


@pytest.fixture
def used(monkeypatch) -> list:
    """Filled with the number of rows of every product of ours."""
    rows, plain = [], module.NativeRunProducts.rows
    count = staticmethod(lambda which, *others, **named: (rows.append(which.n), plain(which, *others, **named))[1])
    monkeypatch.setattr(module.NativeRunProducts, "rows", count)
    monkeypatch.setattr(module, "torch_keeps_to_avx2", lambda: True)
    return rows


@pytest.mark.parametrize("bias", [True, False])
def test_like_takes_the_parameters_and_draws_no_numbers(bias) -> None:
    stock = nn.Linear(6, 10, bias)
    state = torch.get_rng_state()
    linear = Linear.like(stock)
    assert torch.equal(torch.get_rng_state(), state)
    assert linear.weight is stock.weight and linear.bias is stock.bias
    assert list(linear.state_dict()) == list(stock.state_dict())
    x = torch.randn(3, 6)
    assert torch.equal(linear(x), stock(x))


@compiled
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("shape", [(LEAST_ROWS,), (5, 7), (3, 11, 2)])
@pytest.mark.parametrize("inputs, outputs", [(6, LEAST_OUTPUTS), (33, 70), (300, 100)])
def test_equals_the_product_in_float64(used, shape, inputs, outputs, bias) -> None:
    linear, x = Linear(inputs, outputs, bias).eval(), torch.randn(*shape, inputs)
    with torch.no_grad():
        y = linear(x)
        expected = linear.double()(x.double())
    assert len(used) == 1 and y.shape == expected.shape
    torch.testing.assert_close(y.double(), expected, rtol=0, atol=2e-6)


@compiled
def test_of_rows_that_do_not_lie_in_their_order(used) -> None:
    linear, x = Linear(8, LEAST_OUTPUTS).eval(), torch.randn(8, 5, 20).permute(2, 1, 0)
    weight = nn.Parameter(linear.weight.detach().t().contiguous().t())
    with torch.no_grad():
        expected = linear(x.contiguous())
        linear.weight = weight
        assert torch.equal(linear(x), expected)
        for part in (x[:, -1:], x[:, :, :4].repeat(1, 1, 2)[:, :3], torch.randn(32, 16)[:, :8]):
            assert torch.equal(linear(part), linear(part.clone(memory_format=torch.contiguous_format)))
    assert used == [100, 100, 20, 20, 60, 60, 32, 32]


@compiled
def test_when_products_of_ours_are_used(used, monkeypatch) -> None:
    linear, x = Linear(8, LEAST_OUTPUTS).eval(), torch.randn(4, 7, 8)

    def is_used(x: torch.Tensor) -> bool:
        used.clear()
        linear(x)
        return bool(used)

    assert not is_used(x)  # gradients are asked for
    with torch.no_grad():
        assert is_used(x)
        Linear(8, LEAST_OUTPUTS - 1).eval()(x)
        assert len(used) == 1
        assert not is_used(x[:, :3])  # too few
        assert not is_used(x[:0])
        with pytest.raises(RuntimeError, match="shapes cannot be multiplied"):
            linear(torch.randn(32, 4))
        traced = torch.jit.trace(linear, x)
        torch.testing.assert_close(traced(2 * x), linear(2 * x))
        linear.train()
        assert not is_used(x)  # may be computed again with gradients
        linear.eval()
        with torch.autocast("cpu", torch.bfloat16):
            assert not is_used(x)
            assert linear(x).dtype == torch.bfloat16
        with forward_ad.dual_level():
            assert not is_used(forward_ad.make_dual(x, torch.ones_like(x)))
        monkeypatch.setattr(module, "torch_keeps_to_avx2", lambda: False)
        assert not is_used(x)
        monkeypatch.setattr(module, "torch_keeps_to_avx2", lambda: True)
        linear.double()
        assert not is_used(x.double())
