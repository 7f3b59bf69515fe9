"""What is said in one line, and what keeps its traceback."""

import pytest

from fairseq_hyperrouter import UserError
from fairseq_hyperrouter.command_line import explain


def raised_by_fairseq(code):
    """The error that *code* ends with in a module of fairseq's."""
    with pytest.raises(Exception) as caught:
        exec(compile(code, "fairseq/somewhere.py", "exec"), {"__name__": "fairseq.somewhere"})
    return caught.value


@pytest.mark.parametrize(
    "code, message",
    [
        ("raise ValueError('--foo cannot be 3')", "--foo cannot be 3"),
        ("raise ImportError('Please install foo')", "Please install foo"),
        ("import no_such_module", None),
        ("from math import no_such_name", None),
        ("[][1]", None),
    ],
)
def test_what_fairseq_raises(code, message):
    assert explain(raised_by_fairseq(code)) == message


def test_ours_wrapped_in_another():
    try:
        try:
            raise UserError("--foo 3: must be 2")
        except UserError as error:
            raise RuntimeError("failed") from error
    except RuntimeError as error:
        assert explain(error) == "--foo 3: must be 2"
    assert explain(RuntimeError("failed")) is None
