"""``fairseq-hyperrouter report``."""

import argparse

from fairseq_hyperrouter.analysis.layer_numbers import LOOK_AT
from fairseq_hyperrouter.analysis.report import markdown, report, write

from .evaluating import CHECKPOINT, DATA, TOP_KS, add_evaluation, begin, integers, show

HELP = "one page about what checkpoints' routers and experts do"


def add_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("checkpoint", nargs="+", **CHECKPOINT)
    parser.add_argument("--data", required=True, **DATA)
    parser.add_argument("--top-k", help=f"where the loss is evaluated ({TOP_KS})")
    parser.add_argument(
        "--look-at", type=int, default=LOOK_AT, metavar="K", help="experts per token inside (%(default)s)"
    )
    add_evaluation(parser, files="report.html, report.json and the pictures")


def run(args: argparse.Namespace) -> int:
    options = begin(args)
    content = report(args.checkpoint, args.data, integers("--top-k", args.top_k), args.look_at, **options)
    show(markdown(content), write(content, args.out))
    return 0
