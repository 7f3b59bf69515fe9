import math

import pytest
import torch
from fairseq.modules import MultiheadAttention
from torch import Tensor
from torch.autograd import forward_ad

from fairseq_hyperrouter.models import causal_attention as module
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
    """Of what is read: the output at tokens."""
    x = x.clone().requires_grad_()
    attention.zero_grad()
    y, weights = attention(query=x, key=x, value=x, **options)
    padding = options["key_padding_mask"]
    if padding is not None:
        y = y.masked_fill(padding.t()[:, :, None], 0.0)
    (y * torch.linspace(-1, 1, y.numel()).view_as(y)).sum().backward()
    return [y, x.grad, *(parameter.grad for parameter in attention.parameters()), weights]


@pytest.mark.parametrize("attn_mask", [FUTURE, None], ids=["causal", "everything"])
@pytest.mark.parametrize("padding", [None, PADDING, PADDING.flip(1)], ids=["whole", "padded", "padded before"])
@pytest.mark.parametrize("need_weights", [False, True])
def test_equals_stock(stock, ours, attn_mask, padding, need_weights) -> None:
    options = {"attn_mask": attn_mask, "key_padding_mask": padding, "need_weights": need_weights}
    x = torch.randn(T, B, D, dtype=torch.float64)
    *expected, expected_weights = _with_gradients(stock, x, **options)
    *result, weights = _with_gradients(ours, x, **options)
    torch.testing.assert_close(result, expected, rtol=1e-12, atol=1e-12, equal_nan=True)  # stock: no key to see
    assert (weights is None) == (expected_weights is None)


def _written_out(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """softmax(q k^T / sqrt(d)) v in float64, (T, B, H, d)."""
    q, k, v = (one.double().permute(1, 2, 0, 3) for one in (q, k, v))
    future = torch.full((q.size(2), q.size(2)), float("-inf"), dtype=torch.float64).triu(1)
    return ((q @ k.mT / q.size(3) ** 0.5 + future).softmax(-1) @ v).permute(2, 0, 1, 3)


@pytest.mark.parametrize("length", [1, 256, 257, 512, 513])
def test_every_length(length) -> None:
    """Against the softmax written out: whole, in pieces of which the last is short, and in full ones."""
    q, k, v = (torch.randn(length, 2, 3, 4, dtype=torch.float64, requires_grad=True) for _ in range(3))
    expected = _written_out(q, k, v)
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
    for padding in (None, PADDING):
        ours(query=x, key=x, value=x, attn_mask=FUTURE, need_weights=False, key_padding_mask=padding)
        assert told.pop() == {"dropout_p": 0.0, "is_causal": True}
    ours(query=x, key=x, value=x, attn_mask=FUTURE, need_weights=False, key_padding_mask=PADDING.flip(1))
    assert not any(call.get("is_causal") for call in told)


compiled = pytest.mark.skipif(
    module.native is None, reason="no compiler, or a processor without AVX-512: torch computes attention"
)


@compiled
@pytest.mark.parametrize("length", [1, 2, 13, 14, 15, 29, 32, 33, 100, 255, 256, 257, 300, 513, 700])
@pytest.mark.parametrize("width", [1, 8, 32])
def test_our_c_code_at_every_length(length, width) -> None:
    q, k, v = (torch.randn(length, 2, 3, width) for _ in range(3))
    torch.testing.assert_close(module._native(q, k, v).double(), _written_out(q, k, v), rtol=1e-4, atol=3e-6)


@compiled
@pytest.mark.parametrize("width", [3, 16, 17, 31, 33, 48, 64, 100, 128, 255, 256])
def test_our_c_code_at_every_width(width) -> None:
    q, k, v = (torch.randn(70, 1, 2, width) for _ in range(3))
    torch.testing.assert_close(module._native(q, k, v).double(), _written_out(q, k, v), rtol=1e-4, atol=3e-6)


@compiled
def test_our_c_code_takes_any_layout_and_number_of_threads(monkeypatch) -> None:
    q, k, v = (torch.randn(3, 40, 5, 16).transpose(0, 1) for _ in range(3))
    results = []
    for threads in (1, 2, 7, 40):
        monkeypatch.setattr(torch, "get_num_threads", lambda threads=threads: threads)
        results.append(module._native(q, k, v))
    torch.testing.assert_close(results[0].double(), _written_out(q, k, v), rtol=1e-4, atol=3e-6)
    assert all(torch.equal(result, results[0]) for result in results)


@compiled
@pytest.mark.parametrize("scale", [0.0, 1e-20, 1e3, 1e15])
def test_our_c_code_at_any_size_of_scores(scale) -> None:
    """All alike; so far apart that one key takes all."""
    q, k, v = (torch.randn(50, 1, 1, 8) for _ in range(3))
    found = module._native(q * scale, k, v)
    expected = torch.nn.functional.scaled_dot_product_attention(
        *((one.double() * by).permute(1, 2, 0, 3) for one, by in ((q, scale), (k, 1), (v, 1))), is_causal=True
    )
    torch.testing.assert_close(found.double(), expected.permute(2, 0, 1, 3), rtol=1e-3, atol=2e-4)


@compiled
@pytest.mark.parametrize(
    "which, value", [*((which, value) for which in (0, 1) for value in (math.inf, math.nan, 3e38)), (2, 3e38)]
)
def test_our_c_code_sees_nothing_of_the_future(which, value) -> None:
    """And shows a number that is none where it is seen. (0 times a value that is none is none, as in torch.)"""
    inputs = [torch.randn(60, 1, 2, 8) for _ in range(3)]
    before = module._native(*inputs)
    inputs[which][37] = value
    after = module._native(*inputs)
    assert torch.equal(after[:37], before[:37])
    if math.isnan(value):
        assert after[37].isnan().all()


@compiled
@pytest.mark.parametrize("bits", [0x7FC00000, 0x7FC00001, 0x7FFFFFFF, 0xFFFFFFFF, 0x7F800001])
def test_our_c_code_keeps_every_nan(bits) -> None:
    q, k, v = (torch.randn(60, 1, 2, 8) for _ in range(3))
    k.view(torch.int32)[37] = bits - (bits >> 31 << 32)
    assert module._native(q, k, v)[37:].isnan().all()


@compiled
def test_when_our_c_code_is_used(monkeypatch) -> None:
    used = []
    plain = module._native
    monkeypatch.setattr(module, "_native", lambda *inputs: (used.append(len(inputs)), plain(*inputs))[1])
    avx2_only = [True]
    monkeypatch.setattr(module, "torch_keeps_to_avx2", lambda: avx2_only[0])
    q, k, v = (torch.randn(module.SHORTEST, 2, 2, 4) for _ in range(3))

    def is_used(*inputs: Tensor, dropout: float = 0.0, training: bool = False) -> bool:
        used.clear()
        result = causal_attention(*(inputs or (q, k, v)), dropout, training)
        if not dropout:
            torch.testing.assert_close(result.double(), _written_out(*(inputs or (q, k, v))), rtol=1e-4, atol=3e-6)
        return bool(used)

    assert is_used()
    assert not is_used(dropout=0.5)
    with torch.no_grad():
        assert not is_used(training=True)  # may be computed again with gradients
    assert not is_used(q.double(), k.double(), v.double())
    assert not is_used(q, k, v.clone().requires_grad_())
    with torch.no_grad():
        assert is_used(q, k, v.clone().requires_grad_())
    with forward_ad.dual_level():
        assert not module._serves(forward_ad.make_dual(q, torch.ones_like(q)), k, v, 0.0)
    wide = [torch.randn(len(q), 1, 1, module.native.widest + 1) for _ in range(3)]
    assert not is_used(*wide)
    assert not is_used(q[1:], k[1:], v[1:])
    avx2_only[0] = False
    assert not is_used()
    longer = [torch.randn(module.SMALLEST // 16, 1, 1, 16) for _ in range(3)]
    assert is_used(*longer)
    assert not is_used(*(one[1:] for one in longer))
    assert not is_used(*(one.view(module.SHORTEST // 2, 1, 1, -1) for one in longer))
    avx2_only[0] = True
    monkeypatch.setattr(module, "native", None)
    assert not is_used()


@compiled
def test_the_layer_is_the_same_with_our_c_code(monkeypatch) -> None:
    T = module.SMALLEST // 32
    attention = CausalSelfAttention(64, 2, self_attention=True).eval()
    x, mask = torch.randn(T, 2, 64), torch.full((T, T), float("-inf")).triu(1)
    call = {"query": x, "key": x, "value": x, "attn_mask": mask, "need_weights": False}
    with torch.no_grad():
        found = attention(**call)[0]
        monkeypatch.setattr(module, "native", None)
        assert not torch.equal(found, attention(**call)[0])  # it was used
        torch.testing.assert_close(found, attention(**call)[0], rtol=1e-5, atol=1e-6)
