"""``fairseq-hyperrouter allocate``."""

import argparse
from typing import Dict, Optional

from fairseq_hyperrouter.analysis.allocation import allocate
from fairseq_hyperrouter.analysis.evaluation import Evaluator, labels
from fairseq_hyperrouter.analysis.row import Row
from fairseq_hyperrouter.analysis.sweep import markdown, write
from fairseq_hyperrouter.config import format_ints

from .evaluating import CHECKPOINT, DATA, TOP_KS, add_evaluation, begin, integers, show

HELP = "find how many experts each layer of a model needs"


def add_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("checkpoint", **CHECKPOINT)
    parser.add_argument("data", **DATA)
    parser.add_argument("--choices", help=f"k of a layer, separated by commas ({TOP_KS})")
    parser.add_argument("--budget", type=float, metavar="MFLOPS", help="per token, forward (default: every budget)")
    parser.add_argument(
        "--tokens", type=int, default=30_000, metavar="N", help="of --split that the search looks at (default: 30,000)"
    )
    parser.add_argument("--test", default="test", help="where what was found is evaluated (default: %(default)s)")
    add_evaluation(parser, files="allocate.json, allocate.md, allocate.png", split="valid")


def run(args: argparse.Namespace) -> int:
    options = {**begin(args), "label": labels([args.checkpoint])[0]}
    evaluator = Evaluator(args.checkpoint, args.data, tokens=args.tokens, **options)
    choices = evaluator.top_ks("--choices", integers("--choices", args.choices))
    test = Evaluator(args.checkpoint, args.data, **{**options, "split": args.test})
    found = allocate(evaluator, choices, None if args.budget is None else args.budget * 1e6)
    fixed = [test.at(k) for k in choices]
    same = {(row["top_k"],) * len(test.layers): row for row in fixed}
    lists = [row["top_k"] for row in found]
    rows = [*fixed, *({**same[one], "top_k": one} if one in same else test.at(one) for one in lists)]
    table = markdown([row for row in rows if row["top_k"] not in same])
    if args.budget is not None:
        table += f'\nwithin {args.budget:g} MFLOPs: --model-overrides "{_overrides(evaluator, found[0])}"'
    show(table, write(rows, args.out, "allocate"))
    return 0


def _overrides(evaluator: Evaluator, row: Row) -> Dict[str, Optional[str]]:
    """With which the checkpoint does what was measured: exactly so many experts, without a limit of its own."""
    config = evaluator.model.decoder.moe_config
    limits = [name for name in ("moe_eval_threshold", "moe_eval_top_p") if getattr(config, name) is not None]
    return {"moe_eval_top_k": format_ints(row["top_k"]), **dict.fromkeys(limits)}
