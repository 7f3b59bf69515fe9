"""``fairseq-hyperrouter launch``."""

import argparse

from fairseq_hyperrouter.errors import UserError
from fairseq_hyperrouter.launch import launch

HELP = "run a fairseq command as several workers on this machine's CPUs"


def add_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("workers", type=int, metavar="WORKERS", help="how many")
    parser.add_argument("command", nargs=argparse.REMAINDER, metavar="COMMAND", help="as in fairseq-train DATA ...")


def run(args: argparse.Namespace) -> int:
    if not args.command:
        raise UserError("launch: needs a command, as in fairseq-train DATA ...")
    return launch(args.workers, args.command)
