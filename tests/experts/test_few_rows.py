"""The C code for few rows computes what the backend "loop" computes in float64."""

import logging
import shutil

import pytest
import torch
import torch.nn.functional as F
from torch.autograd import forward_ad

from fairseq_hyperrouter.experts import ExpertBank, few_rows
from fairseq_hyperrouter.experts import backend as backends
from fairseq_hyperrouter.native import usable

SIZES = {"num_experts": 5, "embed_dim": 37, "ffn_embed_dim": 50}
MANY_ROWS = "native" if usable.has_native() else "runs"


@pytest.fixture(autouse=True)
def compiled():
    if few_rows.native is None:
        assert shutil.which("gcc") is None, "there is a compiler, but _few_rows was not built"
        pytest.skip("no compiler: the other backends do the work")


@pytest.fixture
def used(monkeypatch):
    """Which backends computed, in order."""
    names = []
    monkeypatch.setattr(backends, "_log_once", lambda name, x: names.append(name))
    return names


def compare(tokens=9, K=2, dropping=None, used=None, **options):
    bank = ExpertBank(**{**SIZES, **options}).eval()
    exact = ExpertBank(**{**SIZES, **options}, backend="loop").double().eval()
    exact.load_state_dict(bank.state_dict())
    x, gate = torch.randn(tokens, bank.weight1.size(1)), torch.rand(tokens, K)
    index = torch.rand(tokens, bank.num_experts).argsort()[:, :K]
    kept = None if dropping is None else torch.rand(tokens, K) >= dropping
    with torch.no_grad():
        found = bank(x, index, gate, kept)
        torch.testing.assert_close(found.double(), exact(x.double(), index, gate.double(), kept), rtol=1e-4, atol=1e-5)
        assert torch.equal(found, bank(x, index, gate, kept))
    if used is not None:
        assert used == ["few_rows", "loop", "few_rows"]


@pytest.mark.parametrize("embed_dim", [1, 3, 4, 37, 64])
@pytest.mark.parametrize("ffn_embed_dim", [1, 15, 16, 50, 700])
def test_sizes(embed_dim, ffn_embed_dim, used):
    compare(embed_dim=embed_dim, ffn_embed_dim=ffn_embed_dim, used=used)


@pytest.mark.parametrize("tokens", [0, 1, 2, 3, 4, 5, 6, 7, 13, 60])
@pytest.mark.parametrize("sizes", [(37, 50), (300, 600)], ids=str)  # the second: more than stays in the cache
def test_rows_of_one_expert(tokens, sizes, used):
    compare(tokens, K=1, num_experts=1, embed_dim=sizes[0], ffn_embed_dim=sizes[1], used=used)


@pytest.mark.parametrize("K", [1, 3, 5])
@pytest.mark.parametrize("dropping", [0, 0.4, 1])
def test_dropped_assignments(K, dropping, used):
    compare(K=K, dropping=dropping, used=used)


@pytest.mark.parametrize("activation", [F.relu, F.gelu, torch.tanh, lambda x: x.t().contiguous().t()])
def test_activations(activation, used):
    compare(activation=activation, used=used)


def test_inputs_need_not_be_contiguous(used):
    bank = ExpertBank(**SIZES).eval()
    x, index, gate = torch.randn(37, 8), torch.randint(5, (2, 8)), torch.rand(2, 8)
    with torch.no_grad():
        y = bank(x.t(), index.t(), gate.t(), (gate > 0.5).t())
        torch.testing.assert_close(
            y, bank(x.t().clone(), index.t().clone(), gate.t().clone(), (gate > 0.5).t().clone())
        )
    assert used == ["few_rows"] * 2


def test_who_is_served(used, monkeypatch):
    """Nobody who trains or wants gradients, another dtype, many rows, or much work where torch has several threads."""

    def backend(tokens=4, dtype=torch.float32, training=False, **options):
        bank = ExpertBank(**{**SIZES, **options}).to(dtype).train(training)
        with torch.no_grad():
            bank(torch.randn(tokens, 37).to(dtype), torch.zeros(tokens, 1, dtype=torch.long), torch.ones(tokens, 1))
        return used.pop()

    assert backend() == "few_rows"
    assert backend(backend="runs") == "runs"
    assert backend(training=True) == MANY_ROWS  # may be computed again with gradients
    assert backend(dtype=torch.float64) == "runs"
    assert backend(tokens=5 * few_rows.MOST_ROWS + 1) == MANY_ROWS
    monkeypatch.setattr(few_rows, "MOST_WORK", 4 * 37 * 50 - 1)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 1)
    assert backend() == "few_rows"
    monkeypatch.setattr(torch, "get_num_threads", lambda: 2)
    assert backend() == MANY_ROWS
    monkeypatch.undo()
    bank = ExpertBank(**SIZES).eval()
    assert bank(torch.randn(4, 37), torch.zeros(4, 1, dtype=torch.long), torch.ones(4, 1)).requires_grad


def test_indices(used):
    """Other integers are left to the other backends; experts that do not exist are not looked for in memory."""
    bank, x, gate = ExpertBank(**SIZES).eval(), torch.randn(4, 37), torch.ones(4, 1)
    with torch.no_grad():
        index = torch.randint(5, (4, 1))
        torch.testing.assert_close(bank(x, index.int(), gate), bank(x, index, gate))
        assert used == [MANY_ROWS, "few_rows"]
        for wrong in (-1, 5, 10**12):
            with pytest.raises(IndexError, match=rf"expert_index {wrong}: must be in 0 \.\. 4"):
                bank(x, torch.full((4, 1), wrong), gate)


def test_forward_mode_is_left_to_others(used):
    """``loop`` computes it, the others say that they cannot; here the tangent would get lost."""
    bank, x, tangent = ExpertBank(**SIZES, backend="loop").eval(), torch.randn(4, 37), torch.randn(4, 37)
    index, gate = torch.randint(5, (4, 1)), torch.ones(4, 1)
    with torch.no_grad(), forward_ad.dual_level():
        # In float64 a step can be so small that no ReLU turns on or off within it.
        dual = forward_ad.make_dual(x.double(), tangent.double())
        exact = forward_ad.unpack_dual(bank.double()(dual, index, gate.double())).tangent
        ahead, behind = (bank(x.double() + step * tangent, index, gate.double()) for step in (1e-7, -1e-7))
        torch.testing.assert_close(exact, (ahead - behind) / 2e-7, rtol=1e-5, atol=1e-6)
        bank.float()
        bank.backend = "auto"
        bank(x, index, gate)
        assert used.pop() == "few_rows"
        with pytest.raises(NotImplementedError, match="forward mode"):
            bank(forward_ad.make_dual(x, tangent), index, gate)
        assert used.pop() == MANY_ROWS


def test_without_a_compiler(monkeypatch, caplog):
    monkeypatch.setattr(few_rows, "native", None)
    monkeypatch.setattr(usable, "run_products", None)
    monkeypatch.setattr(backends, "_logged", set())
    with torch.no_grad(), caplog.at_level(logging.INFO):
        ExpertBank(**SIZES).eval()(torch.randn(4, 37), torch.zeros(4, 1, dtype=torch.long), torch.ones(4, 1))
    assert "computed by the backend runs" in caplog.text
