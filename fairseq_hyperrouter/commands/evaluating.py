"""What the subcommands that evaluate checkpoints have in common."""

import argparse
import os
from pathlib import Path
from typing import Any, Dict, Iterable, Optional, Sequence

from fairseq.utils import import_user_module

from fairseq_hyperrouter.config import parse_ints
from fairseq_hyperrouter.errors import UserError

TOP_KS = "default: 1, 2, 4, ... and all experts"
CHECKPOINT: Dict[str, Any] = {"type": Path, "metavar": "CHECKPOINT", "help": "a language model's checkpoint"}
DATA = {"metavar": "DATA", "help": "folder made by fairseq-preprocess"}


def add_evaluation(parser: argparse.ArgumentParser, *, files: str, split: str = "test") -> None:
    """Add the options of everything that evaluates a checkpoint."""
    out = Path(parser.prog.split()[-1])
    parser.add_argument("--split", default=split, help="train, valid or test (default: %(default)s)")
    parser.add_argument(
        "--batch-size", type=int, default=8, metavar="N", help="samples per batch (default: %(default)s)"
    )
    parser.add_argument("--out", type=Path, default=out, metavar="DIR", help=f"where to write {files} (default: {out})")
    parser.add_argument("--user-dir", metavar="DIR", help="of your own, when the checkpoint was trained with one")
    parser.add_argument("--cpu", action="store_true", help="use no GPU")


def begin(args: argparse.Namespace) -> Dict[str, Any]:
    """Import --user-dir and check --out; the options that the Evaluator takes."""
    if args.user_dir is not None and not os.path.isdir(args.user_dir):
        raise UserError(f"--user-dir {args.user_dir}: no such folder")
    import_user_module(argparse.Namespace(user_dir=args.user_dir))
    if args.out.exists() and not args.out.is_dir():
        raise UserError(f"--out {args.out}: is a file, must be a folder")
    return {"split": args.split, "batch_size": args.batch_size, "cpu": args.cpu}


def integers(option: str, value: Optional[str]) -> Optional[Sequence[int]]:
    """What was given to an option, None where nothing was."""
    return None if value is None else parse_ints(option, value)


def show(table: str, written: Iterable[Path]) -> None:
    """Print the table, and where the files are."""
    print(table)
    for path in written:
        print(f"wrote {path}")
