import pytest
import torch

from fairseq_hyperrouter import LinearRouter, MoELayer
from fairseq_hyperrouter.experts.similarity import cka, similarity_penalty


def test_cka():
    a = torch.randn(50, 6)
    rotation = torch.linalg.qr(torch.randn(6, 6)).Q
    assert cka(a, a).item() == pytest.approx(1.0, abs=1e-5)
    assert cka(a, 3 * a @ rotation + 5).item() == pytest.approx(1.0, abs=1e-5)
    # unrelated outputs, also where there are fewer tokens than dimensions
    for n, D in ((50, 6), (16, 256), (128, 256)):
        values = [cka(torch.randn(n, D), torch.randn(n, D)).item() for _ in range(30)]
        assert abs(sum(values) / 30) < 0.1 and max(values) < 0.5
    many = torch.randn(3000, 4)
    related = many + torch.randn(3000, 4)
    centred, other = many - many.mean(0), related - related.mean(0)  # with many tokens the usual estimate is the same
    usual = (centred.t() @ other).square().sum() / ((centred.t() @ centred).norm() * (other.t() @ other).norm())
    torch.testing.assert_close(cka(many, related), usual, rtol=0, atol=0.01)


def test_cka_by_hand():
    """Four tokens, of which the U-centred Gram matrix has -1/3 where a pair is split and 1/6 elsewhere."""
    a, b, c = (torch.tensor(values).double()[:, None] for values in ([1, -1, 0, 0], [0, 0, 1, -1], [1, 0, -1, 0]))
    assert cka(a, b).item() == pytest.approx(1)  # both split 0 and 1, 2 and 3
    assert cka(a, c).item() == pytest.approx(-1 / 2)
    assert cka(a, c) == cka(c, a)


def test_cka_of_as_many_tokens_as_dimensions():
    """The report's sample: the usual estimate is 0.5 for unrelated outputs."""
    a, b = torch.randn(256, 256), torch.randn(256, 256)
    assert abs(cka(a, b).item()) < 0.05
    rotation = torch.linalg.qr(torch.randn(256, 256)).Q
    assert cka(a, 0.1 * a @ rotation - 2).item() == pytest.approx(1.0, abs=1e-5)


def hsic(k, ell):
    """The unbiased estimator as Song et al. (2012) write it."""
    n = len(k)
    k, ell = (matrix - matrix.diag().diag() for matrix in (k, ell))
    total = (k @ ell).trace() + k.sum() * ell.sum() / ((n - 1) * (n - 2)) - 2 / (n - 2) * (k @ ell).sum()
    return total / (n * (n - 3))


def test_cka_is_the_unbiased_estimate_also_of_nearly_constant_outputs():
    """In training experts' outputs may be nearly the same for all tokens for a while; float32 must bear it."""
    a = torch.randn(30, 5, dtype=torch.float64)
    b = a + torch.randn(30, 5, dtype=torch.float64)
    k, ell = a @ a.t(), b @ b.t()
    expected = hsic(k, ell) / (hsic(k, k) * hsic(ell, ell)).sqrt()
    torch.testing.assert_close(cka(a, b), expected)
    torch.testing.assert_close(cka(a + 1e4, b), expected, rtol=1e-6, atol=1e-6)
    nearly = [(1e-3 * one + 100).float().requires_grad_() for one in (a, b)]
    assert cka(*nearly).item() == pytest.approx(expected.item(), abs=0.01)
    constant = torch.ones(30, 5, requires_grad=True)
    value = cka(constant, nearly[0])
    value.backward()
    assert value == 0 and constant.grad.isfinite().all()


def test_pairs_that_share_tokens():
    """Experts 0 and 1 compute the same and share 20 tokens, 0 and 2 share 20 and differ, 1 and 2 share too few."""
    x, other = torch.randn(60, 6), torch.randn(6, 6)
    chosen = torch.zeros(60, 3, dtype=torch.bool)
    for rows, pair in ((slice(0, 20), (0, 1)), (slice(20, 40), (0, 2)), (slice(40, 50), (1, 2))):
        for expert in pair:
            chosen[rows, expert] = True
    calls = []

    def compute(rows, which):
        calls.append((len(rows), which))
        return (rows @ other).sin() if which == 2 else rows

    found = similarity_penalty(x, chosen, compute)
    assert sorted(calls) == [(20, 0), (20, 0), (20, 1), (20, 2)]
    different = cka(x[20:40], (x[20:40] @ other).sin())
    torch.testing.assert_close(found, (1 + different * (different > 0.5)) / 2, rtol=1e-4, atol=1e-4)
    assert similarity_penalty(x, chosen[:, :1], compute) == 0


def test_the_penalty_falls_in_training():
    torch.manual_seed(0)
    layer = MoELayer(LinearRouter(8, 4), 16, top_k=2, similarity_weight=1.0)
    with torch.no_grad():
        for weight in layer.experts.parameters():
            weight.copy_(weight[:1].expand_as(weight) + 0.01 * torch.randn_like(weight))  # near copies
    x = torch.randn(200, 8)
    optimizer = torch.optim.Adam(layer.experts.parameters(), 0.01)
    history = []
    for _ in range(60):
        optimizer.zero_grad()
        loss = layer(x)[1].loss
        history.append(loss.item())
        if loss.requires_grad:
            loss.backward()
            optimizer.step()
    assert history[0] > 0.9 and history[-1] < 0.6
    assert layer.eval()(x)[1].loss is None
