"""Experts that are divided over workers compute, forward and backward, what one worker with all of them computes."""

import itertools

import pytest
import torch
import torch.distributed as dist

from fairseq_hyperrouter import UserError
from fairseq_hyperrouter.experts import ExpertBank, ExpertParallel
from tests.workers import on_workers

E, D = 4, 6


def batch(tokens, top_k, experts=range(E), dropping=False):
    """Tokens, their experts among *experts*, gates, what is kept, and a gradient of y."""
    choice = torch.rand(tokens, len(experts)).argsort(1)[:, :top_k]
    index = torch.tensor(list(experts))[choice].view(tokens, top_k)
    kept = torch.rand(tokens, top_k) < 0.6 if dropping else None
    return {
        "x": torch.randn(tokens, D).double(),
        "index": index,
        "gate": torch.rand(tokens, top_k).double(),
        "kept": kept,
        "dy": torch.randn(tokens, D).double(),
    }


def cases(workers):
    """name: one batch per worker"""
    even = {f"k={k}": [batch(5, k) for _ in range(workers)] for k in range(1, E + 1)}
    return {
        **even,
        "uneven": [batch(1 + 3 * rank, 2) for rank in range(workers)],
        "a worker without tokens": [batch(4 * (rank != 1), 2) for rank in range(workers)],
        "a worker whose experts nobody chose": [batch(5, 1, range(E // workers)) for _ in range(workers)],
        "dropping": [batch(6, 2, dropping=True) for _ in range(workers)],
        "nothing kept": [{**batch(3, 1), "kept": torch.zeros(3, 1, dtype=torch.bool)} for _ in range(workers)],
        "no token at all": [batch(0, 2) for _ in range(workers)],
    }


def compute(bank, case):
    """y and all gradients."""
    x, gate = case["x"].clone().requires_grad_(), case["gate"].clone().requires_grad_()
    bank.zero_grad()
    y = bank(x, case["index"], gate, case["kept"])
    y.backward(case["dy"])
    return {"y": y.detach(), "x": x.grad, "gate": gate.grad, **{n: p.grad.clone() for n, p in bank.named_parameters()}}


def divided(task):
    """Run on a worker: every case with the experts divided over P workers."""
    parallel = ExpertParallel(task["size"])
    bank = ExpertBank(E, D, 8, dropout=0.0, parallel=parallel).double()
    bank.load_state_dict(task["state"])
    found = {name: compute(bank, batches[dist.get_rank()]) for name, batches in task["cases"].items()}
    bank.gather()
    state = bank.state_dict() if dist.get_rank() == 0 else None
    return {"found": found, "experts": list(bank.local_experts), "state": state}


def together(batches):
    return {
        name: None if batches[0][name] is None else torch.cat([batch[name] for batch in batches]) for name in batches[0]
    }


@pytest.mark.parametrize("workers, size", [(2, 2), (4, 4), (4, 2)])
def test_outputs_and_gradients(preloaded, tmp_path, workers, size):
    """One worker computes the batches of all; x and gate get their rows, each expert the sum over replicas times W."""
    torch.manual_seed(0)
    bank = ExpertBank(E, D, 8).double()
    all_cases = cases(workers)
    task = {"size": size, "state": bank.state_dict(), "cases": all_cases}
    ranks = on_workers(preloaded, divided, workers, tmp_path / "job", task)
    assert [rank["experts"] for rank in ranks] == [
        list(range(place * E // size, (place + 1) * E // size)) for _ in range(workers // size) for place in range(size)
    ]
    for name, batches in all_cases.items():
        expected = compute(bank, together(batches))
        found = [rank["found"][name] for rank in ranks]
        for key in ("y", "x", "gate"):
            torch.testing.assert_close(torch.cat([one[key] for one in found]), expected[key], msg=f"{name}, {key}")
        for key in dict(bank.named_parameters()):
            groups = [found[start : start + size] for start in range(0, workers, size)]
            total = sum(torch.cat([one[key] for one in group]) for group in groups) * workers
            torch.testing.assert_close(total, expected[key], msg=lambda text: f"{name}, {key}: {text}")  # noqa: B023
    for key, weight in bank.state_dict().items():
        assert torch.equal(ranks[0]["state"][key], weight)


def state_without_gather(_):
    bank = ExpertBank(E, D, 8, parallel=ExpertParallel(2))
    with pytest.raises(RuntimeError, match="call gather"):
        bank.state_dict()
    with pytest.raises(UserError, match="num_experts 3: must be a multiple of 2 workers"):
        ExpertBank(3, D, 8, parallel=ExpertParallel(2))
    with pytest.raises(ValueError, match="2 workers are not a multiple of 3"):
        ExpertParallel(3)


def test_a_state_dict_never_holds_some_of_the_experts(preloaded, tmp_path):
    on_workers(preloaded, state_without_gather, 2, tmp_path / "job", None)


def different_generators(_):
    generators = [torch.Generator().manual_seed(seed) for seed in range(E)]
    bank = ExpertBank(E, D, 8, parallel=ExpertParallel(2))
    bank.reset_parameters(generators)
    return bank.weight1.detach()


def test_an_expert_starts_the_same_wherever_it_is(preloaded, tmp_path):
    whole = ExpertBank(E, D, 8)
    whole.reset_parameters([torch.Generator().manual_seed(seed) for seed in range(E)])
    parts = on_workers(preloaded, different_generators, 2, tmp_path / "job", None)
    assert torch.equal(torch.cat(list(itertools.chain(parts))), whole.weight1)
