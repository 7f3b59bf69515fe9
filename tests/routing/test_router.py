"""What every router does alike: selection, gates, precision, padding, gradients, errors."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fairseq_hyperrouter import LinearRouter, Router, RoutingContext, UserError, register_router
from fairseq_hyperrouter.config import MoEConfig
from fairseq_hyperrouter.routing import ROUTERS, Place
from tests import reference

PAPER = ("hyperrouter", "smoe", "smoe-dropout")
"""Top-k of plain logits; what other methods do differently their own tests look at."""
EVERY_ROUTER = pytest.mark.parametrize("name", PAPER)


@settings(max_examples=25, deadline=None)
@given(data=st.data(), num_experts=st.integers(1, 20), num_tokens=st.integers(0, 12), scale=st.sampled_from([1, 1e3]))
def test_gates_and_selection(data, num_experts, num_tokens, scale):
    top_k = data.draw(st.integers(1, num_experts))
    name = data.draw(st.sampled_from(PAPER))
    selected, everything = (ROUTERS[name](5, num_experts, gate_softmax=g) for g in ("selected", "all"))
    everything.load_state_dict(selected.state_dict())
    x = torch.randn(num_tokens, 5) * scale

    routing = selected(x, RoutingContext(top_k))
    assert routing.logits.shape == (num_tokens, num_experts)
    assert routing.expert_index.shape == routing.gate.shape == (num_tokens, top_k)
    assert routing.token_mask is None and routing.kept is None
    torch.testing.assert_close(routing.gate.sum(-1), torch.ones(num_tokens))
    largest_first = routing.logits.sort(dim=-1, descending=True).values[:, :top_k]
    assert torch.equal(routing.logits.gather(1, routing.expert_index), largest_first)

    of_all = everything(x, RoutingContext(top_k))
    assert torch.equal(of_all.expert_index, routing.expert_index)
    torch.testing.assert_close(of_all.gate, of_all.logits.softmax(-1).gather(1, of_all.expert_index))


@EVERY_ROUTER
@pytest.mark.parametrize("gate_softmax", ["selected", "all"])
def test_reference(name, gate_softmax):
    router = ROUTERS[name](7, 6, gate_softmax=gate_softmax).double()
    state = {f"router.{key}": value for key, value in router.state_dict().items()}
    x = torch.randn(9, 7, dtype=torch.float64)
    routing = router(x, RoutingContext(3))
    weight, bias = reference.ROUTER_WEIGHTS[name](state, 6)
    torch.testing.assert_close(routing.logits, x @ weight.t() + bias)
    for z, index, gate in zip(*routing[:3]):
        chosen, gates = reference.select(z, 3, gate_softmax)
        assert index.tolist() == chosen
        torch.testing.assert_close(gate, torch.stack(gates))


@EVERY_ROUTER
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.half])
@pytest.mark.parametrize("autocast", [False, True])
def test_logits_and_gates_are_float32(name, dtype, autocast):
    router = ROUTERS[name](8, 4).to(dtype)
    x = torch.randn(5, 8).to(dtype)
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        routing = router(x, RoutingContext(2))
    assert routing.logits.dtype == routing.gate.dtype == torch.float32
    exact = router.double()(x.double(), RoutingContext(2)).logits
    torch.testing.assert_close(routing.logits.double(), exact, rtol=1e-4, atol=1e-5)


@EVERY_ROUTER
def test_padding_is_not_kept(name):
    padding = torch.tensor([False, True, False, True, True])
    routing = ROUTERS[name](8, 4)(torch.randn(5, 8), RoutingContext(3, padding))
    assert torch.equal(routing.token_mask, ~padding)
    assert torch.equal(routing.kept, ~padding[:, None].expand(5, 3))


@pytest.mark.parametrize("name", ["smoe", "hyperrouter"])
@pytest.mark.parametrize("gate_softmax, has_gradient", [("selected", False), ("all", True)])
def test_gradient_at_one_expert_per_token(name, gate_softmax, has_gradient):
    router = ROUTERS[name](8, 4, gate_softmax=gate_softmax)
    router(torch.randn(20, 8), RoutingContext(1)).gate.square().sum().backward()
    for parameter in router.parameters():
        assert bool(parameter.grad.any()) == has_gradient


@EVERY_ROUTER
def test_drawn_from_its_generator_only(name):
    def weights(seed):
        router = ROUTERS[name](8, 4)
        router.reset_parameters(torch.Generator().manual_seed(seed))
        return torch.cat([value.flatten() for value in router.state_dict().values()])

    assert torch.equal(weights(1), weights(1))
    assert not torch.equal(weights(1), weights(2))


@EVERY_ROUTER
@pytest.mark.parametrize("sizes", [(1, 1), (1, 4), (8, 1)])
def test_smallest_sizes(name, sizes):
    routing = ROUTERS[name](*sizes)(torch.randn(3, sizes[0]), RoutingContext(1))
    assert torch.equal(routing.gate, torch.ones(3, 1))


@EVERY_ROUTER
@pytest.mark.parametrize(
    "arguments, message",
    [
        ({"embed_dim": 0, "num_experts": 4}, r"embed_dim 0: must be at least 1"),
        ({"embed_dim": 4, "num_experts": -1}, r"num_experts -1: must be at least 1"),
        (
            {"embed_dim": 4, "num_experts": 4, "gate_softmax": "some"},
            r"gate_softmax 'some': choose from selected, all",
        ),
    ],
)
def test_errors(name, arguments, message):
    with pytest.raises(UserError, match=message):
        ROUTERS[name](**arguments)
    assert issubclass(UserError, ValueError)


def test_register_router():
    assert register_router("smoe")(LinearRouter) is LinearRouter  # the same class again is no mistake
    with pytest.raises(ValueError, match="'smoe' is already registered, as LinearRouter"):
        register_router("smoe")(type("Other", (Router,), {}))
    assert ROUTERS["smoe"] is LinearRouter


def test_sigmoid_gates():
    routing = LinearRouter(8, 4, gate_softmax="sigmoid", init_std=1.0)(torch.randn(5, 8), RoutingContext(2))
    assert torch.equal(routing.gate, routing.logits.gather(1, routing.expert_index).sigmoid())


def test_jitter_only_in_training():
    router, x = LinearRouter(8, 4, jitter=0.1), torch.ones(1000, 8)
    ratio = router(x, RoutingContext(1)).logits / router.eval()(x, RoutingContext(1)).logits
    assert ratio.std() > 0.01
    assert len(router(x, RoutingContext(1)).logits[:, 0].unique()) == 1


def test_loss_free_balancing_moves_the_load_toward_uniform():
    """On a skewed input; the bias changes the selection and not the gates, and its mean stays 0."""
    torch.manual_seed(0)
    router = LinearRouter(8, 4, loss_free_rate=0.05, init_std=0.3)
    x = torch.randn(400, 8) + 1.0

    def load():
        return router(x, RoutingContext(1)).expert_index.flatten().bincount(minlength=4).float()

    before = load()
    for _ in range(200):
        router.after_update(load(), torch.tensor(400.0))
        assert abs(router.balancing_bias().mean()) < 1e-6
    assert before.max() - before.min() > 150 and load().max() - load().min() < 50
    routing = router(x, RoutingContext(2))
    plain = routing.logits.gather(1, routing.expert_index).softmax(-1)
    assert torch.equal(routing.gate, plain)
    assert torch.equal(router.half().balancing_steps, router.balancing_steps)
    fresh = LinearRouter(8, 4, loss_free_rate=0.05)
    fresh.load_state_dict(router.state_dict())
    assert torch.equal(fresh.balancing_bias(), router.balancing_bias())


@pytest.mark.parametrize("name", ["hash", "base", "stable", "relu", "expert-choice"])
def test_loss_free_balancing_is_refused_where_it_would_do_nothing(name):
    config = MoEConfig(moe_router=name, moe_expert_count=4, moe_loss_free_rate=0.1)
    with pytest.raises(UserError, match=r"loss_free_rate 0.1: \w+ selects in its own way"):
        ROUTERS[name].from_config(config, Place(8, vocabulary=10))


@pytest.mark.parametrize(
    "name, option, message",
    [
        *((name, {"gate_softmax": "all"}, "gate_softmax 'all': choose from") for name in ("hash", "relu", "compete")),
        ("hash", {"jitter": 0.1}, "router jitter 0.1: means nothing to HashRouter"),
    ],
)
def test_what_means_nothing_to_a_router_is_refused(name, option, message):
    vocabulary = {"vocabulary": 10} if name == "hash" else {}
    with pytest.raises(UserError, match=message):
        ROUTERS[name](8, 4, **vocabulary, **option)


@pytest.mark.parametrize("name", ["smoe", "hyperrouter", "noisy-top-k"])
def test_lr_scale(name):
    """The same router at the start; a step of Adam moves what it computes with ten times as far."""
    x, moved = torch.randn(50, 6), {}
    for scale in (None, 10.0):
        config = MoEConfig(moe_router=name, moe_expert_count=4, moe_router_lr_scale=scale)
        router = ROUTERS[name].from_config(config, Place(6))
        router.reset_parameters(torch.Generator().manual_seed(1))
        optimizer = torch.optim.Adam(router.parameters(), lr=1e-5, eps=1e-30)
        before = router.logits(x, RoutingContext(2))
        (before * torch.linspace(0.5, 1.5, 4)).sum().backward()
        optimizer.step()
        getattr(router, "forget", lambda: None)()
        moved[scale] = before.detach(), router.logits(x, RoutingContext(2)).detach() - before.detach()
    torch.testing.assert_close(moved[10.0][0], moved[None][0])
    torch.testing.assert_close(moved[10.0][1], 10 * moved[None][1], rtol=0.02, atol=1e-6)


@pytest.mark.parametrize("name", sorted(ROUTERS))
def test_what_is_saved_can_be_sent(name):
    """gloo and NCCL know no int16: the trainer broadcasts a checkpoint's tensors on a resume."""
    place = Place(8, vocabulary=20)
    state = ROUTERS[name].from_config(MoEConfig(moe_router=name, moe_expert_count=4), place).state_dict()
    sent = (torch.float32, torch.int64, torch.int32, torch.uint8, torch.bool)
    assert {tensor.dtype for tensor in state.values()} <= set(sent)
