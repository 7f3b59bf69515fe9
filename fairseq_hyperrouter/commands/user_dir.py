"""``fairseq-hyperrouter user-dir``."""

import argparse
from pathlib import Path

HELP = "print the path for fairseq's --user-dir"


def add_options(parser: argparse.ArgumentParser) -> None:
    pass  # it takes none


def run(args: argparse.Namespace) -> int:
    print(Path(__file__).absolute().parents[1])
    return 0
