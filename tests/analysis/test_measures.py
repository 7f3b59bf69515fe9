"""Every number against a case computed by hand, or another way."""

import math

import pytest
import torch

from fairseq_hyperrouter.analysis import measures
from fairseq_hyperrouter.experts.similarity import cka


def test_changed():
    one = torch.tensor([[1, 1, 0], [0, 1, 1], [1, 0, 1], [0, 0, 0]]).bool()
    other = torch.tensor([[1, 1, 0], [1, 1, 0], [1, 0, 1], [0, 0, 1]]).bool()
    assert measures.changed(one, other).item() == 0.5


def test_cosines():
    """Of a vector of zeros there is none."""
    items = torch.tensor([[[1.0, 0], [0, 0]], [[1.0, 0], [1, 0]], [[0.0, 0], [0, -2]], [[0.0, 0], [0, 0]]])
    half, nan = 1 / math.sqrt(2), math.nan
    expected = torch.tensor([[1, half, 0, nan], [half, 1, 0, nan], [0, 0, 1, nan], [nan] * 4], dtype=torch.float64)
    rows = items.flatten(1).double()
    torch.testing.assert_close(measures.cosines(rows @ rows.t()), expected, equal_nan=True)


def test_similarities():
    """Against the pair's own function; constant outputs have none, nor has a sample of three tokens."""
    torch.manual_seed(0)
    outputs = torch.randn(4, 9, 5)
    outputs[2], outputs[3] = 3 * outputs[1] + 2, 0.7
    found = measures.similarities(outputs)
    for i in range(3):
        for j in range(3):
            assert found[i, j].item() == pytest.approx(cka(outputs[i].double(), outputs[j].double()).item())
    assert found[1, 2].item() == pytest.approx(1)
    assert found[3].isnan().all() and found[:, 3].isnan().all()
    assert measures.similarities(outputs[:, :3]).isnan().all()


def test_ranks():
    """Even and single directions; singular values 3, 1 have shares 3/4 and 1/4."""
    assert measures.effective_rank(torch.eye(5)).item() == pytest.approx(5)
    assert measures.effective_rank(torch.ones(7, 5)).item() == pytest.approx(1)
    uneven = math.exp(-(0.75 * math.log(0.75) + 0.25 * math.log(0.25)))
    assert measures.effective_rank(torch.diag(torch.tensor([3.0, 1.0]))).item() == pytest.approx(uneven)
    assert measures.numerical_rank(torch.ones(7, 5)) == 1
    assert measures.numerical_rank(torch.eye(5)) == 5
    assert measures.numerical_rank(torch.zeros(3, 3)) == 0
    rows = torch.diag(torch.tensor([1.0, 1e-3])).repeat(2, 1, 1)
    assert measures.numerical_rank(rows, noise=torch.tensor([1e-4, 1e-2])).tolist() == [2, 1]


@pytest.mark.parametrize("entry", [math.nan, math.inf, -math.inf])
def test_ranks_of_what_is_not_finite(entry):
    """None, where torch would raise; the other matrices of a batch have theirs."""
    rows = torch.eye(3).repeat(2, 1, 1)
    rows[1, 0, 2] = entry
    assert measures.effective_rank(rows[1]).isnan()
    found = measures.numerical_rank(rows)
    assert found[0] == 3 and found[1].isnan()


def test_routing_jacobian():
    """By autograd of the whole layer less the experts' own part, and by the formula; its rank is at most K - 1."""
    torch.manual_seed(0)
    D, E, K, T = 7, 5, 3, 4
    W, experts = torch.randn(E, D, dtype=torch.double), torch.randn(E, D, D, dtype=torch.double)
    tokens = torch.randn(T, D, dtype=torch.double)

    def gates(x):
        z = x @ W.t()
        chosen = z.topk(K).indices
        return torch.zeros_like(z).scatter(-1, chosen, z.gather(-1, chosen).softmax(-1))

    def every_expert(x):
        return torch.einsum("eij,...j->...ei", experts, x).tanh()

    found = measures.routing_jacobian(measures.jacobians(gates, tokens), every_expert(tokens))
    assert found.shape == (T, E, D)
    jacobian, terms = torch.autograd.functional.jacobian, []
    for x, rotated in zip(tokens, found):
        g, outputs = gates(x), every_expert(x)
        term = jacobian(lambda x: gates(x) @ every_expert(x), x) - jacobian(lambda x: g @ every_expert(x), x)  # noqa: B023
        torch.testing.assert_close(term, torch.einsum("e,ei,ej->ij", g, outputs - g @ outputs, W))
        torch.testing.assert_close(rotated.t() @ rotated, term.t() @ term)
        terms.append(term)
    assert measures.numerical_rank(found).tolist() == [K - 1] * T
    assert measures.numerical_rank(found.flatten(0, 1)) == torch.linalg.matrix_rank(torch.cat(terms), rtol=1e-6)


def test_routing_jacobian_with_more_experts_than_dimensions():
    of_gates, outputs = torch.randn(2, 9, 4, dtype=torch.double), torch.randn(2, 9, 4)
    found = measures.routing_jacobian(of_gates, outputs)
    term = outputs.transpose(1, 2).double() @ of_gates
    assert found.shape == (2, 4, 4)
    torch.testing.assert_close(found.transpose(1, 2) @ found, term.transpose(1, 2) @ term)


def test_jacobian_of_gates_that_do_not_depend_on_the_token():
    assert measures.jacobians(lambda x: torch.ones(3, 2) + 0 * x.sum(), torch.ones(3, 5)).abs().sum() == 0
    assert measures.jacobians(lambda x: torch.ones(3, 2), torch.ones(3, 5)).abs().sum() == 0
