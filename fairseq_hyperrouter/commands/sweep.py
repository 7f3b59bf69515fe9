"""``fairseq-hyperrouter sweep``."""

import argparse
from typing import List

from fairseq_hyperrouter.analysis.sweep import markdown, sweep, write
from fairseq_hyperrouter.errors import UserError

from .evaluating import CHECKPOINT, DATA, TOP_KS, add_evaluation, begin, integers, show

HELP = "evaluate checkpoints at several numbers of experts per token"


def add_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("checkpoint", nargs="+", **CHECKPOINT)
    parser.add_argument("data", **DATA)
    parser.add_argument(
        "--top-k",
        help="experts per token, separated by commas, whatever threshold or top-p a checkpoint was trained with "
        f"({TOP_KS})",
    )
    parser.add_argument(
        "--top-p", default="", help="beside: the fewest experts whose probabilities add up to this, as in 0.5,0.9"
    )
    parser.add_argument(
        "--threshold", default="", help="beside: the experts whose probability is at least this, as in 0.05,0.1"
    )
    parser.add_argument(
        "--tokens-per-sample", type=int, metavar="N", help="default: what the checkpoint was trained with"
    )
    parser.add_argument(
        "--context-window", type=int, default=0, metavar="N", help="tokens of every sample that only give context"
    )
    add_evaluation(parser, files="sweep.json, sweep.md, sweep.png")


def run(args: argparse.Namespace) -> int:
    options = begin(args)
    limits = [{"top_p": share} for share in _parse_shares("--top-p", args.top_p)]
    limits += [{"threshold": share} for share in _parse_shares("--threshold", args.threshold)]
    rows = []
    try:
        for row in sweep(
            args.checkpoint,
            args.data,
            integers("--top-k", args.top_k),
            limits=limits,
            tokens_per_sample=args.tokens_per_sample,
            context_window=args.context_window,
            **options,
        ):
            rows.append(row)
    finally:  # what is done is not lost when the next checkpoint cannot be read
        if rows:
            show(markdown(rows), write(rows, args.out))
    return 0


def _parse_shares(option: str, value: str) -> List[float]:
    try:
        shares = [float(item) for item in value.split(",") if value]
    except ValueError:
        shares = [-1.0]
    if not all(0 <= share <= 1 for share in shares):
        raise UserError(f"{option} {value}: must be numbers from 0 to 1 separated by commas, as in 0.5,0.9")
    return shares
