"""Every number against a case computed by hand."""

import math

import pytest
import torch

from fairseq_hyperrouter import LinearRouter, Routing, RoutingContext
from fairseq_hyperrouter.routing import metrics


def of(logits, index=((0,),)):
    index = torch.tensor(index).expand(len(logits), -1)
    return Routing(logits, index, torch.ones(index.shape))


def test_entropy():
    """ln E where the router is undecided, 0 where it is sure; a half and two quarters are 1.5 bits."""
    logits = torch.tensor([[0.0, 0.0, 0.0, 0.0], [100.0, 0.0, 0.0, 0.0], [math.log(2), 0.0, 0.0, -1e9]])
    expected = torch.tensor([math.log(4), 0.0, 1.5 * math.log(2)])
    torch.testing.assert_close(metrics.entropy(of(logits)), expected, atol=1e-7, rtol=1e-6)
    assert metrics.entropy(of(torch.zeros(2, 1))).tolist() == [0, 0]


def test_balance_and_margin():
    """Probabilities 0.5, 0.25, 0.125, 0.125."""
    logits = torch.tensor([[0.5, 0.125, 0.25, 0.125]]).log()
    assert metrics.log_inner_balance(of(logits)).item() == pytest.approx(math.log(2))
    assert metrics.outer_balance(of(logits, [[0, 2]])).item() == pytest.approx(0.75)
    assert metrics.margin(of(logits, [[0]])).item() == pytest.approx(math.log(2))
    assert metrics.margin(of(logits, [[0, 2]])).item() == pytest.approx(math.log(2))
    assert metrics.margin(of(logits, [[0, 2, 1]])).item() == pytest.approx(0, abs=1e-7)
    assert metrics.log_inner_balance(of(torch.randn(3, 1))).tolist() == [0, 0, 0]


def test_margin_and_outer_balance_of_the_experts_that_were_chosen():
    """ln 8, ln 4, ln 3, ln 1: the chosen two have 12/16 of the probability and are ln 4/3 above the next."""
    logits = torch.tensor([[8.0, 4.0, 3.0, 1.0], [1.0, 1.0, 1.0, 1.0]]).log()
    routing = Routing(logits, torch.tensor([[0, 1], [2, 0]]), torch.ones(2, 2))
    assert metrics.outer_balance(routing).tolist() == pytest.approx([12 / 16, 1 / 2])
    assert metrics.margin(routing).tolist() == pytest.approx([math.log(4 / 3), 0], abs=1e-7)
    assert metrics.margin(of(logits, [[0, 1, 2, 3]])).tolist() == [0, 0]
    one_each = routing._replace(chosen=torch.tensor([[True, False], [True, False]]))
    assert metrics.margin(one_each).tolist() == pytest.approx([math.log(8 / 4), 0], abs=1e-7)
    assert metrics.outer_balance(one_each).tolist() == pytest.approx([8 / 16, 1 / 4])
    none = routing._replace(chosen=torch.tensor([[False, False], [True, False]]))
    assert metrics.margin(none).tolist() == pytest.approx([0, 0], abs=1e-7)
    assert metrics.outer_balance(none).tolist() == pytest.approx([0, 1 / 4])


def test_margin_where_loss_free_balancing_chooses():
    """z = 3, 2, 0; the bias moves the choice to 2 and 1, of which the lesser logit is 3 below that of 0."""
    router = LinearRouter(3, 3, loss_free_rate=1.0)
    with torch.no_grad():
        router.weight.copy_(torch.eye(3))
        router.bias.zero_()
    router.balancing_steps.copy_(torch.tensor([-4, 0, 4]))
    routing = router(torch.tensor([[3.0, 2.0, 0.0]]), RoutingContext(top_k=2))
    assert routing.expert_index.tolist() == [[2, 1]]
    assert metrics.margin(routing).item() == -3


def test_dropped():
    routing = of(torch.zeros(2, 3), [[0, 1]])
    assert metrics.dropped(routing).tolist() == [0, 0]
    routing = routing._replace(kept=torch.tensor([[True, False], [False, False]]))
    assert metrics.dropped(routing).tolist() == [1, 2]
    routing = routing._replace(chosen=torch.tensor([[True, True], [True, False]]))
    assert metrics.dropped(routing).tolist() == [1, 1]


def test_load():
    load = torch.tensor([[6, 2, 4, 0], [3, 3, 3, 3], [0, 0, 0, 0]])
    assert metrics.load_cv(load).tolist() == pytest.approx([math.sqrt(5) / 3, 0, 0])
    assert metrics.load_imbalance(load).tolist() == pytest.approx([2, 1, 0])
