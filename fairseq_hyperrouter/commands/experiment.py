"""``fairseq-hyperrouter experiment``."""

import argparse
import os
import shlex
import sys
from pathlib import Path

from fairseq_hyperrouter.checks.data_folder import check_folders, check_split
from fairseq_hyperrouter.errors import UserError
from fairseq_hyperrouter.experiments import Experiment, check_run, read_experiment, run_experiment

from .evaluating import DATA, integers, show

HELP = "train and evaluate the runs that a file names"


def add_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("file", type=Path, metavar="FILE", help="as those in examples/paper")
    parser.add_argument("--setting", metavar="NAME", help="which of the file's settings (default: the first)")
    parser.add_argument("--data", metavar="DATA", help=f"{DATA['help']} (default: the setting's)")
    parser.add_argument("--seeds", metavar="N,N", help="as in 1,2,3 (default: the setting's)")
    parser.add_argument(
        "--row",
        action="append",
        default=[],
        metavar="ROW",
        help="only the runs of this row of the table; again for one more",
    )
    parser.add_argument(
        "--against",
        action="append",
        default=[],
        metavar="ROW",
        help="show how far the other rows are from this one, seed by seed; again for one more",
    )
    parser.add_argument(
        "--out", type=Path, metavar="DIR", help="where everything goes (default: runs/NAME OF THE FILE/SETTING)"
    )
    parser.add_argument("--jobs", type=int, default=1, metavar="N", help="runs at a time (default: %(default)s)")
    parser.add_argument("--cpu", action="store_true", help="use no GPU")


def run(args: argparse.Namespace) -> int:
    experiment = read_experiment(args.file, args.setting, integers("--seeds", args.seeds))
    _check_rows(args, experiment)
    experiment = experiment.only(args.row or experiment.rows)
    data = args.data or experiment.data
    if data is None:
        raise UserError(f"--data: is needed, {args.file} names none for {experiment.setting}")
    check_folders(data)
    if not any("--dataset-impl" in run.options for run in experiment.runs):
        check_split(os.path.join(data.partition(os.pathsep)[0], experiment.split))
    for name, run in {run.name: run for run in experiment.runs}.items():  # of its seeds one
        check_run(f"{args.file}: runs: {name}", run, experiment, data)
    out = args.out or Path("runs", args.file.stem, experiment.setting)
    command = shlex.join(["fairseq-hyperrouter", *sys.argv[1:]])
    failed = run_experiment(experiment, data, out, jobs=args.jobs, cpu=args.cpu, command=command, against=args.against)
    table = out / "results.md"
    if table.exists():
        show(table.read_text(), [table.with_suffix(suffix) for suffix in (".json", ".md", ".png")])
    return 1 if failed else 0


def _check_rows(args: argparse.Namespace, experiment: Experiment) -> None:
    for option, names in (("--row", args.row), ("--against", args.against)):
        for name in names:
            if name not in experiment.rows:
                raise UserError(f"{option} {name}: {args.file} has the rows {' / '.join(experiment.rows)}")
    for name in args.against:
        if args.row and name not in args.row:
            raise UserError(f"--against {name}: is left out by --row, add --row {shlex.quote(name)}")
