import math

import pytest
import torch

from fairseq_hyperrouter import Routing
from fairseq_hyperrouter.routing import losses, metrics, totals
from tests import reference


def random_routing(num_tokens=7, num_experts=5, top_k=2, padding=None):
    logits = torch.randn(num_tokens, num_experts, dtype=torch.float64, requires_grad=True)
    gate, index = logits.topk(top_k)
    mask = None if padding is None else ~padding
    return Routing(logits, index, gate.softmax(-1), mask, None if mask is None else mask[:, None].expand_as(index))


def total(metric):
    return lambda routing: totals.sum_over_tokens(routing, metric(routing))


SUMS = {
    "num_tokens": totals.num_tokens,
    "expert_load": totals.expert_load,
    "probability_sum": totals.probability_sum,
    "z_sum": losses.z_sum,
    "entropy": total(metrics.entropy),
    "outer balance": total(metrics.outer_balance),
    "margin": total(metrics.margin),
    "dropped": total(metrics.dropped),
}
ALL = {**SUMS, "balance_loss": losses.balance_loss, "z_loss": losses.z_loss}
PADDING = torch.tensor([False, True, False, False, True, True, False])
MEANS = {
    losses.balance_loss: reference.balance_loss,
    losses.z_loss: reference.z_loss,
    lambda routing: SUMS["entropy"](routing) / totals.num_tokens(routing): reference.entropy,
}


@pytest.mark.parametrize("ours, expected", MEANS.items(), ids=["balance", "z", "entropy"])
@pytest.mark.parametrize("padding", [None, PADDING], ids=["full", "padded"])
def test_reference_values_and_gradients(ours, expected, padding):
    routing = random_routing(padding=padding)
    found = ours(routing)
    wanted = expected(routing.logits, routing.expert_index.tolist(), padding)
    torch.testing.assert_close(found, wanted.squeeze(), rtol=1e-6, atol=1e-6)  # counts are float32
    gradients = [torch.autograd.grad(value, routing.logits)[0] for value in (found, wanted.squeeze())]
    torch.testing.assert_close(*gradients, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("top_k", [1, 2, 4])
def test_balance_loss_is_one_when_even_and_e_at_one_expert(top_k):
    num_experts = 4
    index = torch.stack([(torch.arange(top_k) + t) % num_experts for t in range(8)])
    even = Routing(torch.zeros(8, num_experts), index, torch.ones(8, top_k))
    assert losses.balance_loss(even).item() == pytest.approx(1.0)
    one = Routing(torch.tensor([[100.0, 0, 0, 0]]).expand(8, -1), torch.zeros(8, 1, dtype=torch.long), torch.ones(8, 1))
    assert losses.balance_loss(one).item() == pytest.approx(num_experts)


def test_gradient_flows_only_through_the_probabilities():
    load = totals.expert_load(random_routing())
    assert not load.requires_grad
    routing = random_routing()
    losses.balance_loss(routing).backward()
    assert routing.logits.grad.any()


def test_expert_load_counts_choices():
    routing = Routing(torch.zeros(3, 4), torch.tensor([[0, 1], [1, 3], [3, 1]]), torch.ones(3, 2))
    assert totals.expert_load(routing).tolist() == [1, 3, 0, 2]
    masked = routing._replace(token_mask=torch.tensor([True, False, True]))
    assert totals.expert_load(masked).tolist() == [1, 2, 0, 1]


@pytest.mark.parametrize("loss", ALL.values(), ids=ALL)
def test_padding_counts_nowhere(loss):
    """Whatever stands in padded rows, NaN too, values and gradients are those of the rows that count."""
    routing = random_routing(padding=PADDING)
    counts = Routing(*(field if field is None else field[~PADDING].detach() for field in routing))
    logits = routing.logits.detach().masked_fill(PADDING[:, None], math.nan).requires_grad_()
    found, expected = (
        loss(routing._replace(logits=logits)),
        loss(counts._replace(logits=counts.logits.requires_grad_())),
    )
    torch.testing.assert_close(found, expected)
    if found.requires_grad:
        gradient = torch.autograd.grad(found.sum(), logits)[0]
        torch.testing.assert_close(gradient[~PADDING], torch.autograd.grad(expected.sum(), counts.logits)[0])


@pytest.mark.parametrize("loss", ALL.values(), ids=ALL)
@pytest.mark.parametrize("padding", [None, torch.ones(3, dtype=torch.bool)], ids=["no rows", "only padding"])
def test_no_tokens(loss, padding):
    routing = random_routing(0 if padding is None else 3, padding=padding)
    assert not loss(routing).any()


def test_dropped_counts_tokens_that_count():
    routing = random_routing(3, padding=torch.tensor([False, False, True]))
    kept = torch.tensor([[True, False], [False, False], [False, False]])
    assert SUMS["dropped"](routing._replace(kept=kept)).item() == 3


def test_sums_of_two_halves_are_those_of_the_whole():
    routing = random_routing(padding=PADDING)
    halves = [
        Routing(*(field if field is None else field[rows] for field in routing))
        for rows in (slice(0, 3), slice(3, None))
    ]
    for of in SUMS.values():
        torch.testing.assert_close(sum(of(half) for half in halves), of(routing))


def test_mutual_information_loss():
    """-ln E when every token is sure and experts are used evenly, 0 when all tokens say the same."""
    sure = 50 * torch.eye(4).repeat(3, 1)
    index = torch.zeros(12, 1, dtype=torch.long)
    for logits, expected in ((sure, -math.log(4)), (torch.zeros(12, 4), 0.0), (sure[:1].expand(12, 4), 0.0)):
        routing = Routing(logits, index, torch.ones(12, 1))
        assert losses.mutual_information_loss(routing).item() == pytest.approx(expected, abs=1e-5)
    padded = Routing(torch.cat([sure, torch.randn(3, 4)]), torch.zeros(15, 1).long(), torch.ones(15, 1))
    padded = padded._replace(token_mask=torch.arange(15) < 12)
    assert losses.mutual_information_loss(padded).item() == pytest.approx(-math.log(4), abs=1e-5)


def test_mutual_information_loss_where_a_probability_underflows():
    logits = torch.tensor([[120.0, 0.0], [130.0, 0.0]], requires_grad=True)
    routing = Routing(logits, torch.zeros(2, 1).long(), torch.ones(2, 1))
    losses.mutual_information_loss(routing).backward()
    assert logits.grad.isfinite().all()
