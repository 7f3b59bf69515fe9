import pytest
import torch

from fairseq_hyperrouter import LinearRouter, MoELayer
from fairseq_hyperrouter.experts.similarity import cka, similarity_penalty


def test_cka():
    a, b = torch.randn(50, 6), torch.randn(50, 6)
    rotation = torch.linalg.qr(torch.randn(6, 6)).Q
    assert cka(a, a).item() == pytest.approx(1.0, abs=1e-5)
    assert cka(a, 3 * a @ rotation + 5).item() == pytest.approx(1.0, abs=1e-5)
    assert cka(a, b) < 0.5
    centred_a, centred_b = a - a.mean(0), b - b.mean(0)
    grams = centred_a @ centred_a.t(), centred_b @ centred_b.t()  # HSIC in its other form
    expected = (grams[0] * grams[1]).sum() / (grams[0].norm() * grams[1].norm())
    torch.testing.assert_close(cka(a, b), expected)


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
