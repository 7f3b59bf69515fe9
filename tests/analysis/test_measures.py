"""Every number against a case computed by hand, or another way."""

import math

import pytest
import torch

from fairseq_hyperrouter.analysis import measures


def test_changed():
    one = torch.tensor([[1, 1, 0], [0, 1, 1], [1, 0, 1], [0, 0, 0]]).bool()
    other = torch.tensor([[1, 1, 0], [1, 1, 0], [1, 0, 1], [0, 0, 1]]).bool()
    assert measures.changed(one, other).item() == 0.5


def test_pairwise_cosines():
    items = torch.tensor([[[1.0, 0], [0, 0]], [[1.0, 0], [1, 0]], [[0.0, 0], [0, -2]]])
    half = 1 / math.sqrt(2)
    expected = torch.tensor([[1, half, 0], [half, 1, 0], [0, 0, 1]], dtype=torch.float64)
    torch.testing.assert_close(measures.pairwise(measures.cosine, items), expected)


def test_ranks():
    """Even and single directions; singular values 3, 1 have shares 3/4 and 1/4."""
    assert measures.effective_rank(torch.eye(5)).item() == pytest.approx(5)
    assert measures.effective_rank(torch.ones(7, 5)).item() == pytest.approx(1)
    uneven = math.exp(-(0.75 * math.log(0.75) + 0.25 * math.log(0.25)))
    assert measures.effective_rank(torch.diag(torch.tensor([3.0, 1.0]))).item() == pytest.approx(uneven)
    assert measures.numerical_rank(torch.ones(7, 5)) == 1
    assert measures.numerical_rank(torch.eye(5)) == 5
    assert measures.numerical_rank(torch.zeros(3, 3)) == 0


def test_routing_jacobian():
    """By autograd of the whole layer less the experts' own part, and by the formula; its rank is at most K - 1."""
    torch.manual_seed(0)
    D, E, K = 7, 5, 3
    W, experts = torch.randn(E, D, dtype=torch.double), torch.randn(E, D, D, dtype=torch.double)
    x = torch.randn(D, dtype=torch.double)

    def gates(x):
        z = W @ x
        chosen = z.topk(K).indices
        return torch.zeros(E, dtype=torch.double).scatter(0, chosen, z[chosen].softmax(0))

    outputs = torch.einsum("eij,j->ei", experts, x).tanh()
    found = measures.routing_jacobian(gates, outputs, x)

    def layer(x):
        return gates(x) @ torch.einsum("eij,j->ei", experts, x).tanh()

    def without_gates(x):
        return gates(x).detach() @ torch.einsum("eij,j->ei", experts, x).tanh()

    jacobian = torch.autograd.functional.jacobian
    torch.testing.assert_close(found, jacobian(layer, x) - jacobian(without_gates, x))
    g, y = gates(x), layer(x)
    torch.testing.assert_close(found, torch.einsum("e,ei,ej->ij", g, outputs - y, W))
    assert measures.numerical_rank(found) == K - 1
