"""The console command ``fairseq-hyperrouter``: what fairseq has no command for.

One file per subcommand, each with HELP (one line), ``add_options(parser)`` and ``run(args)``, the exit status.
"""

import argparse
import logging
import sys
from typing import List, Optional

from fairseq_hyperrouter.command_line import explain

from . import allocate, experiment, launch, report, sweep, user_dir

_SUBCOMMANDS = {
    "sweep": sweep,
    "report": report,
    "allocate": allocate,
    "experiment": experiment,
    "launch": launch,
    "user-dir": user_dir,
}


def main(argv: Optional[List[str]] = None) -> int:
    """Run a subcommand; a user's mistake is one line on stderr and exit status 1."""
    parser = argparse.ArgumentParser(prog="fairseq-hyperrouter", description=__doc__.partition("\n")[0])
    subcommands = parser.add_subparsers(required=True, metavar="COMMAND")
    for name, subcommand in _SUBCOMMANDS.items():
        options = subcommands.add_parser(name, help=subcommand.HELP, description=subcommand.HELP)
        subcommand.add_options(options)
        options.set_defaults(run=subcommand.run)
    args = parser.parse_args(argv)
    logging.getLogger().setLevel(logging.WARNING)  # importing fairseq turns on the logs of every library
    try:
        return args.run(args)
    except KeyboardInterrupt:
        return 130
    except Exception as error:
        message = explain(error)
        if message is None:
            raise
        print(f"fairseq-hyperrouter: error: {message}", file=sys.stderr)
        return 1
