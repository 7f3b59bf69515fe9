"""What is compared, of hand-made inspections. Whole reports: tests/end_to_end/test_report.py."""

import pytest
import torch

from fairseq_hyperrouter.analysis.inspection import Inspection
from fairseq_hyperrouter.analysis.page import _changed as changed_on_the_page
from fairseq_hyperrouter.analysis.report import _changed


def inspection(chosen, layers=1, token_ids=(5, 6, 7)):
    return Inspection([], [torch.tensor(chosen).bool()] * layers, torch.tensor(token_ids))


ONE = inspection([[1, 0], [0, 1], [1, 0]])
THREE_EXPERTS = inspection([[1, 0, 0], [0, 1, 0], [1, 0, 0]])
TWO_LAYERS = inspection([[1, 0], [0, 1], [1, 0]], layers=2)
OTHER_TOKENS = inspection([[1, 0], [0, 1], [1, 0]], token_ids=(2, 5, 6))


def test_share_of_tokens_with_other_experts():
    (pair,) = _changed({"one": ONE, "other": inspection([[1, 0], [1, 0], [0, 1]])})
    assert pair == {"first": "one", "second": "other", "share": [pytest.approx(2 / 3)], "incomparable": None}
    assert "66.7%" in "".join(changed_on_the_page([pair]))


@pytest.mark.parametrize(
    "other, reason",
    [(THREE_EXPERTS, "2 and 3 experts"), (TWO_LAYERS, "1 and 2 MoE layers"), (OTHER_TOKENS, "they see other tokens")],
)
def test_why_two_are_not_compared(other, reason):
    (pair,) = _changed({"one": ONE, "other": other})
    assert pair["share"] is None and pair["incomparable"].startswith(reason)
    (note,) = changed_on_the_page([pair])
    assert f"one and other cannot be compared: {pair['incomparable']}" in note
