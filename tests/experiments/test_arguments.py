"""Arguments of fairseq-train, looked at without starting it."""

import pytest

from fairseq_hyperrouter import UserError
from fairseq_hyperrouter.experiments.arguments import check_arguments

MISTAKES = [
    ("--lr-schedular cosine", r"a place: --lr-schedular: fairseq-train has no such option, --lr-scheduler\?"),
    ("--moe-top-q 2", "a place: --moe-top-q: fairseq-train has no such option"),
    ("--lr fast", "a place: --lr: invalid value: 'fast'"),
    ("--arch transfomer_lm", "a place: --arch/-a: invalid choice: 'transfomer_lm'"),
    ("--optimizer adam --moe-top-k", "a place: --moe-top-k: expected one argument"),
    ("--moe-top-k 17", r"a place: --moe-top-k 17: must be an integer between 1 and the number of experts \(16\)"),
    ("--criterion moe_cross_entropy --moe-distill-wt 2", "a place: --moe-distill-wt 2.0: must be between 0 and 1"),
]


@pytest.mark.parametrize("arguments, message", MISTAKES)
def test_mistakes(capsys, arguments, message):
    given = ["data", "--task", "hyperrouter", "--arch", "transformer_lm_hyperrouter", *arguments.split()]
    with pytest.raises(UserError, match=message):
        check_arguments("a place", given)
    assert capsys.readouterr().err == ""
