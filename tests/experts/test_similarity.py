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
