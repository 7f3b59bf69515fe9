import doctest
from contextlib import nullcontext
from itertools import product

import pytest
import torch

from fairseq_hyperrouter import HyperRouter, LinearRouter, MoELayer, UserError, moe_layer
from fairseq_hyperrouter.experts.backend import HAS_GROUPED_MM
from fairseq_hyperrouter.routing import ROUTERS, losses
from tests import reference

D, E, F, T = 5, 16, 6, 8
PADDING = torch.tensor([False, True, False, False] * (T // 4))
EVERY_ROUTER = pytest.mark.parametrize("router", ["hyperrouter", "smoe", "smoe-dropout"])


def make_layer(router="hyperrouter", num_experts=E, embed_dim=D, gate_softmax="selected", **options):
    """A float64 layer whose router is decided enough for its choices not to depend on rounding."""
    chooser = ROUTERS[router](embed_dim, num_experts, gate_softmax=gate_softmax, init_std=0.5)
    return MoELayer(chooser, F, **options).double()


def scalar(y, balance, z):
    """A loss through the output and the auxiliary losses, so that every gradient is seen."""
    weight = torch.linspace(-1, 2, y.numel(), dtype=y.dtype).view_as(y)
    return (y * weight).sum() + balance + z


def check(layer, x, *, router, gate_softmax="selected", padding=None):
    """Compare outputs, choices and all gradients with the reference."""
    state, x_reference = reference.float64_state(layer), x.clone().requires_grad_()
    expected = reference.moe_layer(
        state,
        x_reference,
        router=router,
        top_k=layer.top_k,
        gate_softmax=gate_softmax,
        padding=padding,
        capacity_factor=layer.capacity_factor if layer.training else None,
    )
    x = x.clone().requires_grad_()
    y, routing = layer(x, padding_mask=padding)
    assert routing.expert_index.tolist() == expected.chosen
    if routing.kept is not None:
        assert routing.kept.tolist() == expected.kept
    torch.testing.assert_close(y, expected.y)
    torch.testing.assert_close(routing.logits, expected.logits)
    torch.testing.assert_close(routing.gate, torch.stack([torch.stack(gates) for gates in expected.gates]))

    scalar(y, losses.balance_loss(routing), losses.z_loss(routing)).backward()
    auxiliary = (f(expected.logits, expected.chosen, padding) for f in (reference.balance_loss, reference.z_loss))
    scalar(expected.y, *auxiliary).backward()
    near = {"rtol": 1e-6, "atol": 1e-6}  # the losses' counts are float32
    torch.testing.assert_close(x.grad, x_reference.grad, **near)
    for name, parameter in layer.named_parameters():
        assert parameter.grad is not None, name
        wanted = torch.zeros_like(parameter) if state[name].grad is None else state[name].grad
        torch.testing.assert_close(parameter.grad, wanted, **near, msg=lambda text, name=name: f"{name}: {text}")


@EVERY_ROUTER
@pytest.mark.parametrize("top_k", [1, 2, 4, 8, 16])
@pytest.mark.parametrize("gate_softmax", ["selected", "all"])
def test_reference(router, top_k, gate_softmax):
    for padding, capacity_factor in product([None, PADDING], [None, 0.75]):
        layer = make_layer(router, gate_softmax=gate_softmax, top_k=top_k, capacity_factor=capacity_factor)
        x = torch.randn(T, D, dtype=torch.float64)
        check(layer, x, router=router, gate_softmax=gate_softmax, padding=padding)


@EVERY_ROUTER
@pytest.mark.parametrize("shared_experts", [1, 3])
def test_shared_experts(router, shared_experts):
    layer = make_layer(router, shared_experts=shared_experts, capacity_factor=0.5)
    check(layer, torch.randn(T, D, dtype=torch.float64), router=router, padding=PADDING)


@EVERY_ROUTER
@pytest.mark.parametrize("num_tokens, num_experts, embed_dim, top_k", [(1, 3, 7, 3), (11, 1, 3, 1), (13, 7, 9, 5)])
def test_odd_sizes(router, num_tokens, num_experts, embed_dim, top_k):
    layer = make_layer(router, num_experts=num_experts, embed_dim=embed_dim, top_k=top_k)
    check(layer, torch.randn(num_tokens, embed_dim, dtype=torch.float64), router=router)


@EVERY_ROUTER
def test_all_tokens_on_one_expert(router):
    layer = make_layer(router, top_k=1, capacity_factor=4.0)
    x = torch.randn(D, dtype=torch.float64).expand(T, D) + 1e-6 * torch.randn(T, D, dtype=torch.float64)
    assert len(layer(x)[1].expert_index.unique()) == 1
    check(layer, x, router=router)


@EVERY_ROUTER
@pytest.mark.parametrize("padding", [None, torch.empty(0, dtype=torch.bool)], ids=["no mask", "mask"])
def test_no_tokens(router, padding):
    layer = make_layer(router, capacity_factor=1.0, shared_experts=1)
    x = torch.empty(0, D, dtype=torch.float64, requires_grad=True)
    y, routing = layer(x, padding_mask=padding)
    assert y.shape == (0, D) and routing.expert_index.shape == (0, 2)
    y.sum().backward()
    assert all(p.grad is not None for p in layer.experts.parameters())


def test_three_dimensions():
    layer = make_layer()
    x, padding = torch.randn(2, 4, D, dtype=torch.float64), PADDING.view(2, 4)
    y, routing = layer(x, padding_mask=padding)
    flat, flat_routing = layer(x.view(-1, D), padding_mask=PADDING)
    assert torch.equal(y, flat.view(2, 4, D))
    assert all(a is b is None or torch.equal(a, b) for a, b in zip(routing, flat_routing))
    transposed, _ = layer(x.transpose(0, 1), padding_mask=padding.t())  # not contiguous
    torch.testing.assert_close(transposed.transpose(0, 1), y)


def test_padding_gets_nothing_and_may_be_nan():
    layer = make_layer()
    x = torch.randn(T, D, dtype=torch.float64)
    y, _ = layer(x, padding_mask=PADDING)
    assert not y[PADDING].any()
    assert torch.equal(layer(x.masked_fill(PADDING[:, None], torch.nan), padding_mask=PADDING)[0], y)


def test_unused_experts_get_a_zero_gradient():
    layer = make_layer(top_k=1)
    y, routing = layer(torch.randn(2, D, dtype=torch.float64))
    y.sum().backward()
    unused = [expert for expert in range(E) if expert not in routing.expert_index]
    for name, parameter in layer.experts.named_parameters():
        assert parameter.grad is not None and not parameter.grad[unused].any(), name


def test_gradcheck():
    layer = make_layer(num_experts=4, gate_softmax="all", shared_experts=1)
    x = torch.randn(6, D, dtype=torch.float64, requires_grad=True)
    names, parameters = zip(*layer.named_parameters())

    def forward(x, *parameters):
        return torch.func.functional_call(layer, dict(zip(names, parameters)), (x,))[0]

    assert torch.autograd.gradcheck(forward, (x, *parameters), fast_mode=True)


@EVERY_ROUTER
def test_bfloat16(router):
    layer = MoELayer(ROUTERS[router](D, E, init_std=0.5), F, shared_experts=1, top_k=4).bfloat16()
    x = torch.randn(T, D).bfloat16().requires_grad_()
    y, routing = layer(x)
    assert y.dtype == torch.bfloat16 and routing.logits.dtype == torch.float32
    y.float().square().sum().backward()
    assert x.grad.isfinite().all() and all(p.grad.isfinite().all() for p in layer.parameters())
    exact, exact_routing = layer.double()(x.detach().double())
    assert torch.equal(routing.expert_index, exact_routing.expert_index)
    torch.testing.assert_close(y.double(), exact, rtol=0.05, atol=0.05)


def test_capacity_in_training_only():
    layer = make_layer(capacity_factor=0.1)
    x = torch.randn(T, D, dtype=torch.float64)
    assert not layer(x)[1].kept.all()
    layer.eval()
    assert layer(x)[1].kept is None
    check(layer, x, router="hyperrouter")


def test_dropout_in_training_only():
    layer = make_layer(activation_dropout=0.5, shared_experts=1)
    x = torch.randn(T, D, dtype=torch.float64)
    assert not torch.equal(layer(x)[0], layer(x)[0])
    layer.eval()
    assert torch.equal(layer(x)[0], layer(x)[0])


def test_top_k_of_one_call():
    layer = make_layer(top_k=2)
    x = torch.randn(T, D, dtype=torch.float64)
    assert layer(x, top_k=5)[1].expert_index.shape == (T, 5)
    assert layer(x)[1].expert_index.shape == (T, 2)


@pytest.mark.parametrize(
    "options, message",
    [
        ({"top_k": 0}, r"top_k 0: must be an integer between 1 and the number of experts \(16\)"),
        ({"top_k": 17}, r"top_k 17: must be an integer between 1 and"),
        ({"capacity_factor": 0.0}, r"capacity_factor 0.0: must be greater than 0"),
        ({"capacity_factor": float("nan")}, r"capacity_factor nan: must be greater than 0"),
        ({"shared_experts": -1}, r"shared_experts -1: must be an integer, at least 0"),
    ],
)
def test_errors(options, message):
    with pytest.raises(UserError, match=message):
        make_layer(**options)


def test_error_of_one_call():
    with pytest.raises(UserError, match="top_k 17: must be an integer between 1 and"):
        make_layer()(torch.randn(T, D, dtype=torch.float64), top_k=17)


def test_ffn_embed_dim_error():
    with pytest.raises(UserError, match="ffn_embed_dim 0: must be at least 1"):
        MoELayer(LinearRouter(D, E), 0)


@pytest.mark.parametrize("backend", ["grouped", "blocks"])
@pytest.mark.parametrize("capacity_factor", [None, 1.0])
@pytest.mark.parametrize("router", sorted({*ROUTERS} - {"base", "expert-choice"}))
def test_nothing_is_copied_to_the_host(router, capacity_factor, backend, monkeypatch):
    """Not by the routers either; but base's auction and expert choice with padding ask how many tokens there are.

    Tensors of the device "meta" have no values: whoever asks for one, as a copy from a GPU would, fails.
    """
    if backend == "grouped" and not HAS_GROUPED_MM:
        pytest.skip("this torch has no grouped_mm")
    monkeypatch.setattr(torch, "autocast", lambda *_, **__: nullcontext())  # does not know the device
    options = {"hash": {"vocabulary": 9}, "stable": {"vocabulary": 9, "stage1_updates": 5}}.get(router, {})
    chooser = ROUTERS[router](8, 4, **options)
    layer = MoELayer(chooser, 16, capacity_factor=capacity_factor, backend=backend).to("meta", torch.bfloat16)
    x = torch.empty(20, 8, device="meta", dtype=torch.bfloat16, requires_grad=True)
    padding, ids = (torch.empty(20, device="meta", dtype=dtype) for dtype in (torch.bool, torch.long))
    y, routing = layer(x, top_k=chooser.trains_with or 2, padding_mask=padding, token_ids=ids)
    (y.float().sum() + losses.balance_loss(routing)).backward()
    assert x.grad.shape == x.shape and layer.experts.weight1.grad.shape == layer.experts.weight1.shape


def test_docstring_example():
    result = doctest.testmod(moe_layer, extraglobs={"HyperRouter": HyperRouter})
    assert result.attempted and not result.failed
