"""The file that a training goes on from, looked at before anything is built."""

import argparse
import logging
import os
import pickle
import shutil
import zipfile
from pathlib import Path
from typing import Any, Dict, Optional

import torch

from fairseq_hyperrouter.errors import UserError

logger = logging.getLogger(__name__)


def restored_checkpoint(checkpoint_cfg: Any) -> Optional[Path]:
    """The file that fairseq's trainer will restore with these ``checkpoint`` options; None when there is none.

    Raises:
        UserError (a ValueError): it was named and does not exist.
    """
    path = Path(checkpoint_cfg.save_dir, "checkpoint_last.pt")
    if checkpoint_cfg.restore_file != "checkpoint_last.pt":
        path = Path(checkpoint_cfg.restore_file)
    elif not path.exists():
        path = Path(checkpoint_cfg.continue_once or checkpoint_cfg.finetune_from_model or path)
    if not path.exists():
        if path != Path(checkpoint_cfg.save_dir, "checkpoint_last.pt"):
            raise UserError(f"checkpoint {path}: no such file")
        return None
    return path


def check_readable(path: Path) -> None:
    """Raise a UserError when there is no file at *path*, or none that fairseq's trainer wrote."""
    if not path.is_file():
        raise UserError(f"checkpoint {path}: no such file")
    reason = unreadable(path)
    if reason is not None:
        raise UserError(f"cannot read checkpoint {path}: {reason}")


def unreadable(path: Path) -> Optional[str]:
    """Why the file at *path* cannot be read as a checkpoint of fairseq's trainer; None when it can."""
    if not zipfile.is_zipfile(path):
        return "truncated, or not a checkpoint"
    try:
        state = torch.load(str(path), map_location="cpu", weights_only=True, mmap=True)
    except RuntimeError:
        return "truncated, or not a checkpoint"
    except pickle.UnpicklingError:
        return "it holds objects that are neither tensors nor plain values"
    if not (isinstance(state, dict) and "model" in state and (state.get("cfg") or state.get("args"))):
        return "it was not written by fairseq's trainer"
    return None


def repair(path: Path) -> None:
    """Replace a ``checkpoint_last.pt`` that a kill cut short.

    It is a copy that stock fairseq does not make atomically; the newest whole checkpoint beside it is what was being
    copied.

    Raises:
        UserError (a ValueError): the file is truncated and nothing can take its place.
    """
    if zipfile.is_zipfile(path):
        return
    whole = [other for other in path.parent.glob("checkpoint*.pt") if zipfile.is_zipfile(other)]
    if path.name != "checkpoint_last.pt" or not whole:
        raise UserError(f"cannot read checkpoint {path}: truncated, or not a checkpoint")
    newest = max(whole, key=lambda other: other.stat().st_mtime)
    logger.warning(f"{path} is truncated: replacing it by {newest}")
    partial = path.with_suffix(".pt.tmp")
    shutil.copyfile(newest, partial)
    os.replace(partial, path)


def read_model_cfg(path: Path) -> Dict[str, Any]:
    """The model options that a checkpoint was trained with; its tensors are not read from disk."""
    check_readable(path)
    state = torch.load(str(path), map_location="cpu", weights_only=True, mmap=True)
    model = (state.get("cfg") or {}).get("model") or state.get("args") or {}
    return vars(model) if isinstance(model, argparse.Namespace) else model
