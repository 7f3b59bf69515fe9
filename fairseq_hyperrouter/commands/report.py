"""``fairseq-hyperrouter report``."""

import argparse

from ..analysis.report import markdown, report, write
from ..config import parse_ints
from .evaluating import CHECKPOINT, DATA, TOP_KS, add_evaluation, begin, show

HELP = "one page about what checkpoints' routers and experts do"


def add_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("checkpoint", nargs="+", **CHECKPOINT)
    parser.add_argument("--data", required=True, **DATA)
    parser.add_argument("--top-k", default=TOP_KS, help="where the loss is evaluated (default: %(default)s)")
    parser.add_argument("--look-at", type=int, default=2, metavar="K", help="experts per token inside (%(default)s)")
    add_evaluation(parser, files="report.html, report.json and the pictures")


def run(args: argparse.Namespace) -> int:
    options = begin(args)
    content = report(args.checkpoint, args.data, parse_ints("--top-k", args.top_k), args.look_at, **options)
    show(markdown(content), write(content, args.out))
    return 0
