"""A user's mistake ends in one line at the command line, and in a ValueError with the same text in Python.

Our own checks raise UserError. What stock fairseq raises for a user's mistake (a missing file, a value of the
wrong type, a truncated checkpoint or data file) is recognised here and said in one line too. Everything else
is a bug, and keeps its traceback.
"""

import ast
import errno
import os
import re
import sys
import traceback
from types import TracebackType
from typing import Any, Iterator, List, Optional, Type

from .errors import UserError, WrongCheckpoint, option_name
from .running import running_command

_LOST_WORKER = (
    *("Connection closed by peer", "Connection reset by peer", "Connection was likely closed", "Broken pipe"),
    *("Timed out waiting", "remote process exited", "NCCL communicator was aborted", "ncclRemoteError"),
)
_REFUSALS = (Exception, AssertionError, ImportError, NotImplementedError, ValueError)
"""What fairseq raises to refuse an option."""


def explain(error: BaseException) -> Optional[str]:
    """The user's mistake behind *error* in one line; None when it is not one."""
    for link in _chain(error):  # stock fairseq wraps some of ours in a vaguer one
        if isinstance(link, WrongCheckpoint):
            return f"checkpoint {_local(link, 'filename', '')} {link}"
        if isinstance(link, UserError):
            return str(link)
        if type(link).__name__ == "ProcessRaisedException":  # of a worker that fairseq spawned: only text is left
            found = re.findall(r"^fairseq_hyperrouter\.errors\.\w+: (.*)$", str(link), flags=re.MULTILINE)
            if found:
                return found[-1]
    for link in _chain(error, handled=False):  # what was handled before another error came is no mistake of a user's
        message = _explain_stock(link)
        if message is not None:
            return " ".join(message.split())
    return _explain_overrides(sys.argv)


def one_line_errors() -> None:
    """From now on, end this program with one line instead of a traceback when its user made a mistake."""
    show_traceback = sys.excepthook

    def hook(kind: Type[BaseException], error: BaseException, trace: Optional[TracebackType]) -> None:
        message = explain(error)
        if message is None:
            show_traceback(kind, error, trace)
        else:
            command = running_command().replace("_", "-")
            name = f"fairseq-{command}" if command else os.path.basename(sys.argv[0])
            print(f"{name}: error: {message}", file=sys.stderr, flush=True)

    sys.excepthook = hook
    os.environ.setdefault("HYDRA_FULL_ERROR", "1")  # else fairseq-hydra-train prints a traceback of its own


def _chain(error: Optional[BaseException], handled: bool = True) -> Iterator[BaseException]:
    """*error* and what it was raised from; with *handled* also what was being handled when it was raised."""
    while error is not None:
        yield error
        error = error.__cause__ or (error.__context__ if handled and not error.__suppress_context__ else None)


def _explain_stock(error: BaseException) -> Optional[str]:
    from omegaconf.errors import ConfigKeyError, ValidationError

    text = str(error)
    if isinstance(error, (ConfigKeyError, ValidationError)):
        option = option_name(str(error.full_key or "").rpartition(".")[2])
        if "'ListConfig' to string" in text:
            return f"{option}: must be a text, as in '1,8'"
        return f"{option}: {text.splitlines()[0]}"
    if isinstance(error, ValueError) and text.startswith("Seed must be"):
        return f"--seed: {text}"
    registry = _local(error, "REGISTRY", None)
    if isinstance(error, KeyError) and isinstance(registry, dict):
        return f"{_local(error, 'registry_name', '')} {text}: choose from {', '.join(sorted(registry))}"
    if isinstance(error, OSError) and text.startswith("Model file not found"):
        return text
    if isinstance(error, ValueError) and text.startswith("Incorrect dictionary format"):
        return f"dict.txt of DATA is damaged: {text}"
    if isinstance(error, (IsADirectoryError, NotADirectoryError, PermissionError)):
        return f"{error.filename}: {str(error.strerror).lower()}"
    if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
        return f"{error.filename or 'writing'}: {str(error.strerror).lower()}; what was saved before is whole"
    if isinstance(error, FileNotFoundError):
        if error.filename is None:
            return f"{text}; data folders are made by fairseq-preprocess"
        hint = "; DATA must be a folder made by fairseq-preprocess" if str(error.filename).endswith("dict.txt") else ""
        return f"no such file: {error.filename}{hint}"
    if getattr(error, "name", None) in ("xm", "xrt_world_size", "torch_xla"):
        return (
            "--bf16: with several workers stock fairseq-train takes it for a TPU; "
            "use fairseq-hydra-train with common.bf16=true"
        )
    if isinstance(error, RuntimeError) and "EADDRINUSE" in text:
        port = re.search(r"port: (\d+)", text)
        return (
            f"another program listens on this training's port{' ' + port[1] if port else ''}: choose another, by "
            "--distributed-port or in --distributed-init-method"
        )
    if isinstance(error, RuntimeError) and any(sign in text for sign in _LOST_WORKER):
        return (
            "another worker of this training has ended, or lost its connection; what was saved is in --save-dir, and "
            f"the same command goes on from there ({text.splitlines()[0][:100]})"
        )
    where = "".join(traceback.format_tb(error.__traceback__)) + text
    if isinstance(error, AttributeError) and "load_model_ensemble" in where and _local(error, "filename", "") is None:
        return "--path: must name a checkpoint"
    if "indexed_dataset.py" in where and isinstance(error, (AssertionError, ValueError)):
        return f"{_local(error, 'path', 'the data folder')} is damaged: make it again with fairseq-preprocess"
    if "load_checkpoint_to_cpu" in where:
        from .checks.checkpoint_file import unreadable

        path = _local(error, "local_path", "")
        reason = unreadable(path)
        if reason is not None:
            return f"cannot read checkpoint {path}: {reason}"
    imports = getattr(error, "name", None) is not None  # a module that is broken, not fairseq's "please install"
    if type(error) in _REFUSALS and not imports and _said_by_fairseq(error):
        return text
    return None


def _said_by_fairseq(error: BaseException) -> bool:
    """Whether fairseq itself raised *error*, with a text: that is how it refuses options."""
    frames = [frame for frame, _ in traceback.walk_tb(error.__traceback__)]
    if not frames:
        return False
    package = str(frames[-1].f_globals.get("__name__")).partition(".")[0]
    return package in ("fairseq", "fairseq_cli") and bool(str(error))


def _explain_overrides(arguments: List[str]) -> Optional[str]:
    """Stock fairseq calls eval on --model-overrides, which then fails in many ways."""
    if "--model-overrides" not in arguments[:-1]:
        return None
    overrides = arguments[arguments.index("--model-overrides") + 1]
    try:
        if isinstance(ast.literal_eval(overrides), dict):
            return None
    except (ValueError, SyntaxError):
        pass
    return f"--model-overrides {overrides}: must be a dict in Python's notation, as in \"{{'moe_eval_top_k': 1}}\""


def _local(error: BaseException, variable: str, default: str) -> Any:
    """The value of a local *variable* of the frames that *error* passed through: the file it was about."""
    for frame, _ in reversed(list(traceback.walk_tb(error.__traceback__))):
        if variable in frame.f_locals:
            return frame.f_locals[variable]
    return default
