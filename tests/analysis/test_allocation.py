"""The search for a k per layer, with a model whose loss is known."""

from types import SimpleNamespace

import pytest

from fairseq_hyperrouter import UserError
from fairseq_hyperrouter.analysis.allocation import allocate

GAIN = (8.0, 1.0, 0.0)
"""How much each of three layers gains from more experts: bits = sum of gain / k."""


class Evaluator(SimpleNamespace):
    path, has_experts, layers = "some.pt", True, GAIN

    def at(self, top_k, show):
        self.asked.append(top_k)
        bits = sum(gain / k for gain, k in zip(GAIN, top_k))
        return {"top_k": top_k, "bits_per_token": bits, "flops_per_token": 100.0 * sum(top_k)}


def test_every_budget():
    """The layer that gains nothing gets no experts, the one that gains most gets them first."""
    evaluator = Evaluator(asked=[])
    found = allocate(evaluator, [4, 1, 2])
    assert [row["top_k"] for row in found] == [(1, 1, 1), (2, 1, 1), (2, 2, 1), (4, 1, 1), (4, 2, 1), (4, 4, 1)]
    assert len(evaluator.asked) == len(set(evaluator.asked))


@pytest.mark.parametrize("budget, expected", [(1200, (4, 4, 1)), (899, (4, 2, 1)), (650, (4, 1, 1)), (300, (1, 1, 1))])
def test_budget(budget, expected):
    """The only list is the best within it, though the largest has as much."""
    (found,) = allocate(Evaluator(asked=[]), [1, 2, 4], budget)
    assert found["top_k"] == expected


def test_a_list_beside_the_way():
    """The layer that is given up first is the one that is needed when the others are given up."""
    bits = {"222": 0, "122": 0.1, "212": 0.2, "221": 0.3, "112": 5.2, "121": 5.1, "211": 1, "111": 9}
    evaluator = Evaluator(asked=[])
    at = evaluator.at
    evaluator.at = lambda top_k, show: {**at(top_k, show), "bits_per_token": bits["".join(map(str, top_k))]}
    (found,) = allocate(evaluator, [1, 2], 400)
    assert found["top_k"] == (2, 1, 1)
    assert len(evaluator.asked) == len(set(evaluator.asked))


@pytest.mark.parametrize("budget", [None, 1200])
def test_a_model_that_is_best_with_few_experts(budget):
    """As one is that was trained with few."""
    evaluator = Evaluator(asked=[])
    at = evaluator.at
    evaluator.at = lambda top_k, show: {**at(top_k, show), "bits_per_token": sum((k - 2) ** 2 for k in top_k)}
    assert allocate(evaluator, [1, 2, 4], budget)[-1]["top_k"] == (2, 2, 2)


def test_a_router_that_gives_fewer_experts_than_it_may():
    """relu's tokens have as many as are above 0: a smaller k may cost as much, and do as well."""
    evaluator = Evaluator(asked=[])
    evaluator.at = lambda top_k, show: Evaluator.at(evaluator, tuple(min(k, 2) for k in top_k), show) | {"top_k": top_k}
    found = allocate(evaluator, [1, 2, 4])
    assert [row["flops_per_token"] for row in found] == [300, 400, 500]
    assert found[-1]["bits_per_token"] == 4.5


def test_mistakes():
    with pytest.raises(UserError, match=r"--budget 0.000299: must be at least 0.01 MFLOPs per token, that of k = 1"):
        allocate(Evaluator(asked=[]), [1, 2], 299)
    with pytest.raises(UserError, match=r"--budget nan: must be at least"):
        allocate(Evaluator(asked=[]), [1, 2], float("nan"))
    with pytest.raises(UserError, match=r"CHECKPOINT some\.pt: has no experts"):
        allocate(Evaluator(asked=[], has_experts=False), [1, 2])
