import pytest
import torch
from fairseq.modules import MultiheadAttention
from torch import Tensor

from fairseq_hyperrouter.models.causal_attention import CausalSelfAttention, causal_attention

T, B, D = 9, 3, 16
FUTURE = torch.full((T, T), float("-inf"), dtype=torch.float64).triu(1)
PADDING = torch.arange(T) >= torch.tensor([[T], [5], [7]])


@pytest.fixture
def stock() -> MultiheadAttention:
    torch.manual_seed(1)
    return MultiheadAttention(D, 4, self_attention=True).double()


@pytest.fixture
def ours(stock: MultiheadAttention) -> CausalSelfAttention:
    attention = CausalSelfAttention(D, 4, self_attention=True).double()
    attention.load_state_dict(stock.state_dict())
    return attention


def _with_gradients(attention: MultiheadAttention, x: Tensor, **options: object) -> list:
    x = x.clone().requires_grad_()
    attention.zero_grad()
    y, weights = attention(query=x, key=x, value=x, **options)
    (y * torch.linspace(-1, 1, y.numel()).view_as(y)).sum().backward()
    return [y, x.grad, *(parameter.grad for parameter in attention.parameters()), weights]


@pytest.mark.parametrize("attn_mask", [FUTURE, None], ids=["causal", "everything"])
@pytest.mark.parametrize("padding", [None, PADDING], ids=["whole", "padded"])
@pytest.mark.parametrize("need_weights", [False, True])
def test_equals_stock(stock, ours, attn_mask, padding, need_weights) -> None:
    options = {"attn_mask": attn_mask, "key_padding_mask": padding, "need_weights": need_weights}
    x = torch.randn(T, B, D, dtype=torch.float64)
    *expected, expected_weights = _with_gradients(stock, x, **options)
    *result, weights = _with_gradients(ours, x, **options)
    torch.testing.assert_close(result, expected, rtol=1e-12, atol=1e-12)
    assert (weights is None) == (expected_weights is None)


@pytest.mark.parametrize("length", [1, 256, 257, 512, 513])
def test_every_length(length) -> None:
    """Against the softmax written out: whole, in pieces of which the last is short, and in full ones."""
    q, k, v = (torch.randn(2, 3, length, 4, dtype=torch.float64, requires_grad=True) for _ in range(3))
    future = torch.full((length, length), float("-inf"), dtype=torch.float64).triu(1)
    expected = (q @ k.transpose(2, 3) / 2 + future).softmax(-1) @ v
    found = causal_attention(q, k, v)
    weight = torch.linspace(-1, 1, found.numel(), dtype=torch.float64).view_as(found)
    gradients = [torch.autograd.grad((y * weight).sum(), (q, k, v)) for y in (found, expected)]
    torch.testing.assert_close([found, *gradients[0]], [expected, *gradients[1]], rtol=1e-11, atol=1e-11)


def test_token_by_token_equals_all_at_once(ours) -> None:
    x, state = torch.randn(T, B, D, dtype=torch.float64), {}
    at_once, _ = ours(query=x, key=x, value=x, attn_mask=FUTURE, need_weights=False)
    steps = [ours(query=one, key=one, value=one, incremental_state=state, need_weights=False)[0] for one in x.split(1)]
    torch.testing.assert_close(torch.cat(steps), at_once, rtol=0, atol=1e-6)  # stock: a softmax in float32


def test_drops_in_training_only_and_as_stock_does(stock, ours) -> None:
    x = torch.randn(T, B, D, dtype=torch.float64)
    for attention in (stock, ours):
        attention.dropout_module.p = 0.5
    call = {"query": x, "key": x, "value": x, "attn_mask": FUTURE, "need_weights": False}
    drawn = []
    for attention in (stock, ours):
        torch.manual_seed(2)
        drawn.append(attention(**call)[0])
    torch.testing.assert_close(*drawn, rtol=1e-12, atol=1e-12)
    assert not torch.allclose(ours(**call)[0], drawn[1])
    ours.eval()
    torch.testing.assert_close(ours(**call)[0], ours(**call)[0], rtol=0, atol=0)


def test_tells_torch_that_the_mask_is_causal(ours, monkeypatch) -> None:
    told = []
    plain = torch.nn.functional.scaled_dot_product_attention
    monkeypatch.setattr(
        torch.nn.functional, "scaled_dot_product_attention", lambda *a, **k: (told.append(k), plain(*a, **k))[1]
    )
    x = torch.randn(T, B, D, dtype=torch.float64)
    ours(query=x, key=x, value=x, attn_mask=FUTURE, need_weights=False)
    assert told == [{"dropout_p": 0.0, "is_causal": True}]
