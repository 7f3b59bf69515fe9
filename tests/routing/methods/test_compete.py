import pytest
import torch
import torch.nn.functional as F

from fairseq_hyperrouter import MoELayer, RoutingContext, UserError
from fairseq_hyperrouter.config import MoEConfig
from fairseq_hyperrouter.routing import CompeteRouter, Place


def router(**options):
    return CompeteRouter(6, 4, init_std=0.5, **options)


@pytest.mark.parametrize("version", ["v1", "v2"])
def test_a_competition(version):
    torch.manual_seed(0)
    layer = MoELayer(router(rate=1.0, version=version), 8, top_k=2).double()
    x = torch.randn(7, 6).double()
    y, routing = layer(x)
    every = [layer.experts(x, torch.full((7, 1), i), torch.ones(7, 1).double()) for i in range(4)]
    outputs = torch.stack(every, 1)
    affinity = outputs.norm(dim=-1) if version == "v1" else F.softplus(outputs).mean(-1)
    gate, index = affinity.topk(2)
    assert torch.equal(routing.expert_index, index)
    expected = (gate.softmax(-1)[..., None] * outputs.gather(1, index[..., None].expand(-1, -1, 6))).sum(1)
    torch.testing.assert_close(y, expected)
    loss = (routing.logits.softmax(-1) - affinity.softmax(-1)).square().mean()
    if version == "v2":
        chosen = outputs.gather(1, index[..., None].expand(-1, -1, 6))
        loss = loss + 0.01 * F.cosine_similarity(chosen[:, 0], chosen[:, 1], dim=-1).mean()
    torch.testing.assert_close(routing.loss, loss)


def test_a_competition_for_no_token():
    layer = MoELayer(router(rate=1.0), 8, top_k=2)
    y, routing = layer(torch.empty(0, 6))
    assert y.shape == (0, 6) and routing.expert_index.shape == (0, 2)


def test_the_router_learns_what_competition_says():
    torch.manual_seed(0)
    layer = MoELayer(router(rate=1.0), 8, top_k=1)
    with torch.no_grad():
        layer.experts.bias2 += torch.randn(4, 6)
    x = torch.randn(200, 6)

    def agreement():
        winner = layer.train()(x)[1].expert_index
        return (layer.eval()(x)[1].expert_index == winner).float().mean()

    before = agreement()
    optimizer = torch.optim.Adam(layer.router.parameters(), 0.05)
    for _ in range(150):
        optimizer.zero_grad()
        layer.train()(x)[1].loss.backward()
        optimizer.step()
    assert agreement() > before + 0.2


def test_when_it_competes():
    routers = [router(rate=0.3, index=i, count=8, warm_up=50) for i in range(8)]
    table = torch.tensor([[one.competes(update) for one in routers] for update in range(1000)])
    assert not table[:50].any() and table.sum(1).max() == 3
    alone = router(rate=0.05, warm_up=50)
    assert 20 < sum(alone.competes(update) for update in range(1000)) < 80
    assert not any(router(rate=0.0).competes(update) for update in range(100))


def test_outside_training_and_mistakes():
    layer = MoELayer(router(rate=1.0), 8, top_k=2).eval()
    routing = layer(torch.randn(7, 6))[1]
    assert routing.loss is None and torch.equal(routing.expert_index, routing.logits.topk(2).indices)
    for name, value in (("rate", 2.0), ("version", "v3")):
        with pytest.raises(UserError, match=f"--moe-compete-{name} {value!r}"):
            router(**{name: value})
    assert RoutingContext(1).experts is None


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.half])
def test_a_competition_in_half_precision(dtype):
    layer = MoELayer(router(rate=1.0), 8, top_k=2).to(dtype)
    y, routing = layer(torch.randn(7, 6).to(dtype))
    assert y.dtype == dtype and routing.loss > 0


def test_warm_up_and_place_come_from_the_model():
    config = MoEConfig(moe_router="compete", moe_expert_count=4, max_update=1000, seed=7)
    router = CompeteRouter.from_config(config, Place(6, index=2, count=3))
    assert (router.index, router.count, router.warm_up, router.seed) == (2, 3, 50, 7)


def test_the_bias_of_loss_free_balancing_has_no_say_in_a_competition():
    """It is in units of logits, from which affinities differ by far less: it would choose alone."""
    torch.manual_seed(0)
    layer = MoELayer(router(rate=1.0, loss_free_rate=0.1), 8, top_k=2)
    x = torch.randn(50, 6)
    before = layer(x)[1].expert_index
    layer.router.balancing_steps[:2] += 100
    assert torch.equal(layer(x)[1].expert_index, before)
    assert (layer.eval()(x)[1].expert_index < 2).all()
