import copy

import pytest
import torch

from fairseq_hyperrouter import HyperNetwork, HyperRouter, LinearRouter, RoutingContext, UserError
from fairseq_hyperrouter.config import MoEConfig
from fairseq_hyperrouter.routing import Place


def test_only_the_embedding_is_trained():
    router = HyperRouter(8, 4)
    assert [name for name, _ in router.named_parameters()] == ["embedding"]
    assert router.embedding.shape == (8,)
    assert not list(router.hypernetwork.parameters())
    frozen = {f"hypernetwork.{name}" for name in ("weight1", "bias1", "weight2", "bias2")}
    assert frozen <= set(router.state_dict())


def test_frozen_stays_frozen_in_training():
    router = HyperRouter(8, 4)
    before = {name: value.clone() for name, value in router.state_dict().items()}
    optimizer = torch.optim.SGD(router.parameters(), lr=1.0, weight_decay=0.1)
    router(torch.randn(20, 8), RoutingContext(2)).gate.square().sum().backward()
    optimizer.step()
    changed = {name for name, value in router.state_dict().items() if not torch.equal(value, before[name])}
    assert changed == {"embedding"}


@pytest.mark.parametrize("init_std", [None, 0.02])
def test_same_weights_in_evaluation_and_after_loading(init_std):
    router = HyperRouter(8, 4, init_std=init_std)
    trained = router.train().generate()
    evaluated = router.eval().generate()
    fresh = HyperRouter(8, 4)
    fresh.load_state_dict(router.state_dict())
    for a, b, c in zip(trained, evaluated, fresh.generate()):
        assert torch.equal(a, b) and torch.equal(a, c)


def test_inference_generates_once(monkeypatch):
    router, x, calls = HyperRouter(8, 4).eval(), torch.randn(3, 8), []
    generate = HyperRouter.generate
    monkeypatch.setattr(HyperRouter, "generate", lambda self, *dtype: calls.append(dtype) or generate(self, *dtype))
    expected = router(x, RoutingContext(2)).logits
    router.make_generation_fast_()
    calls.clear()
    assert all(torch.equal(router(x, RoutingContext(2)).logits, expected) for _ in range(3))
    assert len(calls) == 1

    other = HyperRouter(8, 4)
    router.load_state_dict(other.state_dict())
    assert torch.equal(router(x, RoutingContext(2)).logits, other(x, RoutingContext(2)).logits)
    router.double()
    assert router(x.double(), RoutingContext(2)).logits.dtype == torch.float64
    router.train()
    assert router(x.double(), RoutingContext(2)).logits.requires_grad


def test_generated_std_at_the_papers_sizes():
    stds = []
    for seed in range(8):
        torch.manual_seed(seed)
        stds.append(HyperRouter(256, 16).generate()[0].std())
    assert torch.stack(stds).mean().item() == pytest.approx(0.072, rel=0.05)


def test_hypernetwork_init():
    torch.manual_seed(0)
    network = HyperNetwork(256, 256, 16 * 257)
    for weight in (network.weight1, network.weight2):
        assert weight.std().item() == pytest.approx(0.02, rel=0.02)
        assert weight.mean().item() == pytest.approx(0.0, abs=1e-3)
    assert not network.bias1.any() and not network.bias2.any()


@pytest.mark.parametrize("sizes", [{}, {"embedding_dim": 3}, {"embedding_dim": 20, "hidden_dim": 9}], ids=str)
def test_init_std_is_hit_exactly_and_keeps_the_embedding(sizes):
    for seed in range(5):
        plain, scaled = HyperRouter(8, 4, **sizes), HyperRouter(8, 4, init_std=0.3, **sizes)
        for router in (plain, scaled):
            router.reset_parameters(torch.Generator().manual_seed(seed))
        assert torch.equal(plain.embedding, scaled.embedding)
        assert scaled.generate()[0].square().mean().sqrt().item() == pytest.approx(0.3, rel=1e-5)


@pytest.mark.parametrize("schedule, given, expected", [("elastic", None, 10), ("elastic", 1.0, 1), ("linear", None, 1)])
def test_the_embedding_of_an_elastic_model_learns_faster(schedule, given, expected):
    config = MoEConfig(moe_router="hyperrouter", moe_top_k_schedule=schedule, moe_router_lr_scale=given)
    assert HyperRouter.from_config(config, Place(8)).lr_scale == config.router_lr_scale == expected
    config.moe_router = "smoe"
    assert LinearRouter.from_config(config, Place(8)).lr_scale == config.router_lr_scale == 1


def test_init_std_of_a_one_by_one_router_is_not_nan():
    weight, bias = HyperRouter(1, 1, init_std=0.3).generate()
    assert weight.isfinite().all() and bias.isfinite().all()


def test_a_hypernetwork_that_generates_nothing_is_refused():
    """With one hidden unit it is dead in about half of the draws: W is 0 and could never be trained."""
    refused = 0
    for seed in range(20):
        torch.manual_seed(seed)
        try:
            assert HyperRouter(8, 4, hidden_dim=1).generate()[0].any()
        except UserError as error:
            assert "--moe-hyper-hidden-dim 1: no hidden unit is active" in str(error)
            refused += 1
    assert 0 < refused < 20


def test_shared_hypernetwork():
    first = HyperRouter(8, 4)
    second = HyperRouter(8, 4, hypernetwork=first.hypernetwork)
    assert second.hypernetwork is first.hypernetwork
    frozen = copy.deepcopy(first.hypernetwork.state_dict())
    second.reset_parameters()
    assert all(torch.equal(value, frozen[name]) for name, value in first.hypernetwork.state_dict().items())
    assert not torch.equal(first.generate()[0], second.generate()[0])


def test_errors():
    with pytest.raises(UserError, match=r"maps 8 -> 36, this router needs 8 -> 45"):
        HyperRouter(8, 5, hypernetwork=HyperRouter(8, 4).hypernetwork)
    with pytest.raises(UserError, match=r"embedding dimension 0: must be at least 1"):
        HyperRouter(8, 4, embedding_dim=0)
    with pytest.raises(UserError, match=r"hidden width -2: must be at least 1"):
        HyperRouter(8, 4, hidden_dim=-2)
