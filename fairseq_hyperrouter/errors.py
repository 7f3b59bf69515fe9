"""A user's mistake ends in one line at the command line, and in a ValueError with the same text in Python.

Our own checks raise UserError. What stock fairseq raises for a user's mistake (a missing file, a value of the
wrong type, a truncated checkpoint or data file) is recognised here and said in one line too. Everything else
is a bug, and keeps its traceback.
"""

import os
import sys
import traceback
from types import TracebackType
from typing import Any, Iterator, Optional, Type


class UserError(ValueError):
    """A mistake in an option, a file or a call; the message names it, its value and what is allowed."""


def explain(error: BaseException) -> Optional[str]:
    """The user's mistake behind *error* in one line; None when it is not one."""
    chain = list(_chain(error))
    for link in chain:  # the innermost UserError wins: stock fairseq wraps some in a vaguer one
        if isinstance(link, UserError):
            return str(link)
    for link in chain:
        message = _explain_stock(link)
        if message is not None:
            return " ".join(message.split())
    return None


def running_command() -> str:
    """Which of fairseq's commands this program is, as in "train" or "eval_lm"; "" when it is none."""
    program = sys.modules["__main__"].__spec__
    if program is not None and program.parent == "fairseq_cli":  # python -m fairseq_cli.train
        return program.name.rpartition(".")[2]
    name = os.path.basename(sys.argv[0])
    return name[len("fairseq-") :].replace("-", "_") if name.startswith("fairseq-") else ""


def one_line_errors() -> None:
    """From now on, end this program with one line instead of a traceback when its user made a mistake."""
    show_traceback = sys.excepthook

    def hook(kind: Type[BaseException], error: BaseException, trace: Optional[TracebackType]) -> None:
        message = explain(error)
        if message is None:
            show_traceback(kind, error, trace)
        else:
            print(f"{os.path.basename(sys.argv[0])}: error: {message}", file=sys.stderr, flush=True)

    sys.excepthook = hook
    os.environ.setdefault("HYDRA_FULL_ERROR", "1")  # else fairseq-hydra-train prints a traceback of its own


def _chain(error: Optional[BaseException]) -> Iterator[BaseException]:
    while error is not None:
        yield error
        error = error.__cause__ or error.__context__


def _explain_stock(error: BaseException) -> Optional[str]:
    from omegaconf.errors import OmegaConfBaseException

    text = str(error)
    if isinstance(error, OmegaConfBaseException):
        option = str(error.full_key or "").rpartition(".")[2].replace("_", "-")
        return f"--{option}: {text.splitlines()[0]}"
    if isinstance(error, OSError) and text.startswith("Model file not found"):
        return text
    if isinstance(error, FileNotFoundError):
        if error.filename is None:
            return f"{text}; data folders are made by fairseq-preprocess"
        hint = "; DATA must be a folder made by fairseq-preprocess" if str(error.filename).endswith("dict.txt") else ""
        return f"no such file: {error.filename}{hint}"
    where = "".join(traceback.format_tb(error.__traceback__)) + text
    if "indexed_dataset.py" in where and isinstance(error, (AssertionError, ValueError, OSError)):
        return f"{_local(error, 'path', 'the data folder')} is damaged: make it again with fairseq-preprocess"
    if "load_checkpoint_to_cpu" in where and type(error).__module__ in ("builtins", "_pickle", "pickle", "zipfile"):
        return f"cannot read checkpoint {_local(error, 'local_path', '')}: truncated, or not a checkpoint"
    return None


def _local(error: BaseException, variable: str, default: str) -> Any:
    """The value of a local *variable* of the frames that *error* passed through: the file it was about."""
    for frame, _ in reversed(list(traceback.walk_tb(error.__traceback__))):
        if variable in frame.f_locals:
            return frame.f_locals[variable]
    return default
