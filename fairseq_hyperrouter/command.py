"""The console command ``fairseq-hyperrouter``: what fairseq has no command for."""

import argparse
import logging
import os
import shlex
import sys
from pathlib import Path
from typing import Any, Callable, Dict, List, Optional

from .command_line import explain
from .errors import UserError


def main(argv: Optional[List[str]] = None) -> int:
    """Run a subcommand; a user's mistake is one line on stderr and exit status 1."""
    args = _parser().parse_args(argv)
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


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="fairseq-hyperrouter", description=__doc__)
    subcommands = parser.add_subparsers(required=True, metavar="COMMAND")

    sweep = subcommands.add_parser("sweep", help="evaluate checkpoints at several numbers of experts per token")
    sweep.add_argument("checkpoint", nargs="+", type=Path, metavar="CHECKPOINT", help="a language model's checkpoint")
    sweep.add_argument("data", metavar="DATA", help="folder made by fairseq-preprocess")
    sweep.add_argument(
        "--top-k", default="1,2,4,8,16", help="experts per token, separated by commas (default: %(default)s)"
    )
    sweep.add_argument(
        "--top-p", default="", help="beside: the fewest experts whose probabilities add up to this, as in 0.5,0.9"
    )
    sweep.add_argument(
        "--tokens-per-sample", type=int, metavar="N", help="default: what the checkpoint was trained with"
    )
    sweep.add_argument(
        "--context-window", type=int, default=0, metavar="N", help="tokens of every sample that only give context"
    )
    _add_evaluation(sweep, _sweep, "sweep.json, sweep.md, sweep.png", split="test")

    report = subcommands.add_parser("report", help="one page about what checkpoints' routers and experts do")
    report.add_argument("checkpoint", nargs="+", type=Path, metavar="CHECKPOINT", help="a language model's checkpoint")
    report.add_argument("--data", required=True, metavar="DATA", help="folder made by fairseq-preprocess")
    report.add_argument("--top-k", default="1,2,4,8,16", help="where the loss is evaluated (default: %(default)s)")
    report.add_argument("--look-at", type=int, default=2, metavar="K", help="experts per token inside (%(default)s)")
    _add_evaluation(report, _report, "report.html, report.json and the pictures", split="test")

    allocate = subcommands.add_parser("allocate", help="find how many experts each layer of a model needs")
    allocate.add_argument("checkpoint", type=Path, metavar="CHECKPOINT", help="a language model's checkpoint")
    allocate.add_argument("data", metavar="DATA", help="folder made by fairseq-preprocess")
    allocate.add_argument("--choices", default="1,2,4,8,16", help="k of a layer, at most the experts (%(default)s)")
    allocate.add_argument("--budget", type=float, metavar="MFLOPS", help="per token, forward (default: every budget)")
    allocate.add_argument("--test", default="test", help="where what was found is evaluated (default: %(default)s)")
    _add_evaluation(allocate, _allocate, "allocate.json, allocate.md, allocate.png", split="valid")

    launch = subcommands.add_parser("launch", help="run a fairseq command as several workers on this machine's CPUs")
    launch.add_argument("workers", type=int, metavar="WORKERS", help="how many")
    launch.add_argument("command", nargs=argparse.REMAINDER, metavar="COMMAND", help="as in fairseq-train DATA ...")
    launch.set_defaults(run=_launch)

    experiment = subcommands.add_parser("experiment", help="train and evaluate the runs that a file names")
    experiment.add_argument("file", type=Path, metavar="FILE", help="as those in examples/paper")
    experiment.add_argument("--setting", metavar="NAME", help="which of the file's settings (default: the first)")
    experiment.add_argument("--data", metavar="DATA", help="folder made by fairseq-preprocess (default: the setting's)")
    experiment.add_argument("--seeds", metavar="N,N", help="as in 1,2,3 (default: the setting's)")
    experiment.add_argument(
        "--out", type=Path, metavar="DIR", help="where everything goes (default: runs/NAME OF THE FILE/SETTING)"
    )
    experiment.add_argument("--jobs", type=int, default=1, metavar="N", help="runs at a time (default: %(default)s)")
    experiment.add_argument("--cpu", action="store_true", help="use no GPU")
    experiment.set_defaults(run=_experiment)

    user_dir = subcommands.add_parser("user-dir", help="print the path for fairseq's --user-dir")
    user_dir.set_defaults(run=_user_dir)
    return parser


def _add_evaluation(parser: argparse.ArgumentParser, run: Callable[..., int], files: str, split: str) -> None:
    """The options of everything that evaluates a checkpoint."""
    parser.add_argument("--split", default=split, help="train, valid or test (default: %(default)s)")
    parser.add_argument(
        "--batch-size", type=int, default=8, metavar="N", help="samples per batch (default: %(default)s)"
    )
    out = Path(parser.prog.split()[-1])
    parser.add_argument("--out", type=Path, default=out, metavar="DIR", help=f"where to write {files} (default: {out})")
    parser.add_argument("--user-dir", metavar="DIR", help="of your own, when the checkpoint was trained with one")
    parser.add_argument("--cpu", action="store_true", help="use no GPU")
    parser.set_defaults(run=run)


def _begin(args: argparse.Namespace) -> Dict[str, Any]:
    """What everything that evaluates does first; the options of the Evaluator."""
    _import_user_dir(args.user_dir)
    if args.out.exists() and not args.out.is_dir():
        raise UserError(f"--out {args.out}: is a file, must be a folder")
    return {"split": args.split, "batch_size": args.batch_size, "cpu": args.cpu}


def _sweep(args: argparse.Namespace) -> int:
    from .analysis.sweep import markdown, sweep, write
    from .config import parse_ints

    options = _begin(args)
    rows = []
    try:
        for row in sweep(
            args.checkpoint,
            args.data,
            parse_ints("--top-k", args.top_k),
            top_p=_parse_shares("--top-p", args.top_p),
            tokens_per_sample=args.tokens_per_sample,
            context_window=args.context_window,
            **options,
        ):
            rows.append(row)
    finally:  # what is done is not lost when the next checkpoint cannot be read
        if rows:
            print(markdown(rows))
            for path in write(rows, args.out):
                print(f"wrote {path}")
    return 0


def _report(args: argparse.Namespace) -> int:
    from .analysis.report import markdown, report, write
    from .config import parse_ints

    options = _begin(args)
    content = report(args.checkpoint, args.data, parse_ints("--top-k", args.top_k), args.look_at, **options)
    print(markdown(content))
    for path in write(content, args.out):
        print(f"wrote {path}")
    return 0


def _allocate(args: argparse.Namespace) -> int:
    from .analysis.allocation import allocate
    from .analysis.evaluation import Evaluator, as_text
    from .analysis.sweep import markdown, write
    from .config import parse_ints

    options = _begin(args)
    evaluator = Evaluator(args.checkpoint, args.data, **options)
    choices = parse_ints("--choices", args.choices)
    if evaluator.has_experts:
        evaluator.model.decoder.check_top_k("--choices", choices)
    found = allocate(evaluator, choices, None if args.budget is None else args.budget * 1e6)
    test = Evaluator(args.checkpoint, args.data, **{**options, "split": args.test})
    rows = [test.at(k) for k in choices] + [test.at(row["top_k"]) for row in found]
    print(markdown(rows))
    if args.budget is not None:
        best = as_text(found[0]["top_k"])
        print(f"within {args.budget:g} MFLOPs: --model-overrides \"{{'moe_eval_top_k': '{best}'}}\"")
    for path in write(rows, args.out, "allocate"):
        print(f"wrote {path}")
    return 0


def _parse_shares(option: str, value: str) -> List[float]:
    try:
        shares = [float(item) for item in value.split(",") if value]
    except ValueError:
        shares = [-1.0]
    if not all(0 <= share <= 1 for share in shares):
        raise UserError(f"{option} {value}: must be numbers from 0 to 1 separated by commas, as in 0.5,0.9")
    return shares


def _import_user_dir(path: Optional[str]) -> None:
    from fairseq.utils import import_user_module

    if path is not None and not os.path.isdir(path):
        raise UserError(f"--user-dir {path}: no such folder")
    import_user_module(argparse.Namespace(user_dir=path))


def _launch(args: argparse.Namespace) -> int:
    from .launch import launch

    if not args.command:
        raise UserError("launch: needs a command, as in fairseq-train DATA ...")
    return launch(args.workers, args.command)


def _experiment(args: argparse.Namespace) -> int:
    from .config import parse_ints
    from .data_folder import check_folders
    from .experiments import read_experiment, run_experiment

    seeds = None if args.seeds is None else parse_ints("--seeds", args.seeds)
    experiment = read_experiment(args.file, args.setting, seeds)
    data = args.data or experiment.data
    if data is None:
        raise UserError(f"--data: is needed, {args.file} names none for {experiment.setting}")
    check_folders(data)
    out = args.out or Path("runs", args.file.stem, experiment.setting)
    command = shlex.join(["fairseq-hyperrouter", *sys.argv[1:]])
    failed = run_experiment(experiment, data, out, jobs=args.jobs, cpu=args.cpu, command=command)
    if (out / "results.md").exists():
        print((out / "results.md").read_text())
        for kind in ("json", "md", "png"):
            print(f"wrote {out}/results.{kind}")
    return 1 if failed else 0


def _user_dir(args: argparse.Namespace) -> int:
    print(os.path.dirname(os.path.abspath(__file__)))
    return 0


if __name__ == "__main__":
    sys.exit(main())
