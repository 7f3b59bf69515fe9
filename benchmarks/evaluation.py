"""fairseq-eval-lm at fewer experts: how much of the speed-up that the FLOPs promise is there.

python -m benchmarks.evaluation DATA [--quick]      (DATA: a folder made by fairseq-preprocess)
"""

import argparse
import logging
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any, List

from fairseq_hyperrouter.analysis.evaluation import Evaluator, Row

from .commands import COMMON, EXPERTS, HIDDEN, LAYERS, WIDTH, cpu_seconds, experts
from .harness import parser, report

TOP_KS = (1, 2, 4, 8, 16)


def main() -> None:
    """Measure, print and write the table."""
    options = parser(__doc__)
    options.add_argument("data", help="folder made by fairseq-preprocess")
    options.add_argument("--tokens-per-sample", default="512", help="context (default: %(default)s)")
    args = options.parse_args()
    logging.disable(logging.WARNING)
    rounds = _measure(args)
    report("evaluation", {_title(args): _rows(rounds)}, rounds)


def _measure(args: argparse.Namespace) -> List[List[Row]]:
    """What the Evaluator found at every k, in every round, with the process's CPU time per token."""
    with tempfile.TemporaryDirectory() as folder:
        options = [option for option in COMMON if option != "--no-save"]
        options += [*experts("hyperrouter", 2), "--batch-size", "8", "--tokens-per-sample", args.tokens_per_sample]
        cpu_seconds([args.data, *options, "--save-dir", folder, "--max-update", "1"])
        checkpoint = Path(folder, "checkpoint_last.pt")
        evaluator = Evaluator(checkpoint, args.data, cpu=True)
        return [[_timed(evaluator, k) for k in TOP_KS] for _ in range(1 if args.quick else 3)]


def _timed(evaluator: Evaluator, k: int) -> Row:
    start = time.process_time()
    row = evaluator.at(k)
    return {**row, "tokens_per_second": row["tokens"] / (time.process_time() - start)}


def _rows(rounds: List[List[Row]]) -> List[List[Any]]:
    speed = {
        k: statistics.median(rows[place]["tokens_per_second"] for rows in rounds) for place, k in enumerate(TOP_KS)
    }
    flops = {row["top_k"]: row["flops_per_token"] for row in rounds[0]}
    rows = [["k", "tokens/s", "MFLOPs/token", "faster than k=16", "FLOPs promise", "share of the promise"]]
    for k in TOP_KS:
        faster, promised = speed[k] / speed[16], flops[16] / flops[k]
        rows.append([k, f"{speed[k]:,.0f}", flops[k] / 1e6, faster, promised, faster / promised])
    return rows


def _title(args: argparse.Namespace) -> str:
    symbols = f"{len((Path(args.data) / 'dict.txt').read_text().splitlines())} symbols"
    model = f"{LAYERS} layers, d {WIDTH}, F {HIDDEN}, E {EXPERTS}"
    return f"fairseq-eval-lm on the test split, {symbols}, context {args.tokens_per_sample}, {model}"


if __name__ == "__main__":
    main()
