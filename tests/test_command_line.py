"""What is said in one line, and what keeps its traceback."""

import pytest
from omegaconf import OmegaConf, ValidationError

from fairseq_hyperrouter import MoEConfig, UserError
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


@pytest.mark.parametrize(
    "handled", [FileNotFoundError(2, "No such file", "/cache"), PermissionError(13, "denied", "/x")]
)
def test_a_bug_after_an_error_that_was_handled(handled):
    """It keeps its traceback: what was missing, and could be, is no mistake."""
    try:
        try:
            raise handled
        except OSError:
            raise KeyError("a bug")  # noqa: B904
    except KeyError as error:
        assert explain(error) is None
    assert str(handled.filename) in explain(handled)


def test_a_list_where_a_text_belongs():
    """In --model-overrides of a stock task; ours takes it."""
    config = OmegaConf.structured(MoEConfig())
    with pytest.raises(ValidationError) as caught:
        config.moe_eval_top_k = OmegaConf.create([1, 8])
    assert explain(caught.value) == "--moe-eval-top-k: must be a text, as in '1,8'"
