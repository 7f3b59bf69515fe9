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
    """The layer that gains nothing gives its experts away first, the one that gains most last."""
    evaluator = Evaluator(asked=[])
    found = allocate(evaluator, [4, 1, 2])
    assert [row["top_k"] for row in found] == [
        (1, 1, 1),
        (2, 1, 1),
        (4, 1, 1),
        (4, 2, 1),
        (4, 4, 1),
        (4, 4, 2),
        (4, 4, 4),
    ]
    assert len(evaluator.asked) == len(set(evaluator.asked))


@pytest.mark.parametrize("budget, expected", [(1200, (4, 4, 4)), (899, (4, 2, 1)), (650, (4, 1, 1)), (300, (1, 1, 1))])
def test_budget(budget, expected):
    """The first list is the best within it."""
    assert allocate(Evaluator(asked=[]), [1, 2, 4], budget)[0]["top_k"] == expected


def test_mistakes():
    with pytest.raises(UserError, match=r"--budget 0.000299: must be at least 0.00, that of k = 1"):
        allocate(Evaluator(asked=[]), [1, 2], 299)
    with pytest.raises(UserError, match=r"CHECKPOINT some\.pt: has no experts"):
        allocate(Evaluator(asked=[], has_experts=False), [1, 2])
