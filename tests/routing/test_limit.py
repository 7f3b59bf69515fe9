"""How a token may go to fewer than K experts."""

import pytest
import torch

from fairseq_hyperrouter.routing import Limit, LinearRouter, RoutingContext

TOP_K = 4


@pytest.fixture(params=["selected", "all"])
def routed(request):
    """route(limit): the Routing of 40 tokens over 6 experts."""
    torch.manual_seed(0)
    router, x = LinearRouter(8, 6, init_std=1.0, gate_softmax=request.param), torch.randn(40, 8)
    return lambda limit=None: router(x, RoutingContext(TOP_K, limit=limit))


def assert_kept(routed, limit, expected):
    """expected(token, its probabilities, best first) -> how many it keeps; gates as without the other experts."""
    routing, plain = routed(limit), routed()
    probability = plain.logits.softmax(-1).gather(1, plain.expert_index)
    renormalised = torch.allclose(plain.gate.sum(1), torch.ones(40))
    counts = [expected(token, of_token.tolist()) for token, of_token in enumerate(probability)]
    assert torch.equal(routing.kept, torch.arange(TOP_K) < torch.tensor(counts)[:, None])
    kept = plain.gate * routing.kept
    torch.testing.assert_close(routing.gate, kept / kept.sum(1, keepdim=True) if renormalised else kept)
    assert torch.equal(routing.chosen_mask().sum(1), torch.tensor(counts))
    assert len(set(counts)) > 1


def test_threshold(routed):
    """Those of the K whose probability reaches it, and always the best."""
    assert_kept(routed, Limit(threshold=0.2), lambda _, p: max(1, sum(one >= 0.2 for one in p)))


def test_top_p(routed):
    """The fewest that reach it together; all K where they do not."""

    def fewest(_, p):
        return next((n for n in range(1, TOP_K + 1) if sum(p[:n]) >= 0.7), TOP_K)

    assert_kept(routed, Limit(top_p=0.7), fewest)
    assert routed(Limit(top_p=1.0)).kept.all()
    assert routed(Limit(top_p=0.0)).kept.sum() == 40


@pytest.mark.parametrize("limit", [Limit(top_p=0.5), Limit(threshold=0.3)])
def test_most_probable_where_a_bias_selects(limit):
    """Loss-free balancing puts another expert first than the router's own probabilities."""
    router = LinearRouter(2, 3, loss_free_rate=1.0)
    with torch.no_grad():
        router.weight.copy_(torch.tensor([[4.0, 0.0], [2.0, 0.0], [0.0, 0.0]]))
    router.balancing_steps.copy_(torch.tensor([0, 5, 0]))
    routing = router(torch.tensor([[1.0, 0.0]]), RoutingContext(2, limit=limit))
    assert routing.expert_index.tolist() == [[1, 0]]
    assert routing.kept.tolist() == [[False, True]] and routing.gate.tolist() == [[0.0, 1.0]]


def test_token_top_k(routed):
    assert_kept(routed, Limit(token_top_k=torch.arange(40) % TOP_K + 1), lambda token, _: token % TOP_K + 1)


def test_several(routed):
    both = Limit(threshold=0.1, token_top_k=torch.arange(40) % TOP_K + 1)
    assert_kept(routed, both, lambda token, p: min(token % TOP_K + 1, max(1, sum(one >= 0.1 for one in p))))
