"""fairseq-eval-lm at fewer experts: how much of the speed-up that the FLOPs promise is there.

python -m benchmarks.evaluation DATA [--quick]      (DATA: a folder made by fairseq-preprocess)
"""

import logging
import tempfile
import time
from pathlib import Path
from typing import Any, List

from fairseq_hyperrouter.analysis.evaluation import Evaluator, Row

from .harness import medians, parser, report
from .models import SMALL, Model, experts
from .sizes import EXPERTS, TOP_KS
from .training import updates


def main() -> None:
    """Measure, print and write the table."""
    options = parser(__doc__, data=True)
    options.add_argument("--tokens-per-sample", type=int, default=512, help="context (default: %(default)s)")
    options.add_argument("--batch-size", type=int, default=8, help="samples per batch (default: %(default)s)")
    args = options.parse_args()
    logging.disable(logging.WARNING)
    model = SMALL._replace(samples=args.batch_size, tokens=args.tokens_per_sample)
    rounds = _measure(model, args.data, 1 if args.quick else 3)
    report("evaluation", {_title(model, args.data): _rows(rounds)}, rounds)


def _measure(model: Model, data: str, rounds: int) -> List[List[Row]]:
    """What the Evaluator found at every k, in every round, with the process's CPU time per token."""
    with tempfile.TemporaryDirectory() as folder:
        updates([data, *experts(model, 2), "--cpu", "--save-dir", folder], 0)
        checkpoint = Path(folder, "checkpoint_last.pt")
        evaluator = Evaluator(checkpoint, data, batch_size=model.samples, cpu=True)
        return [[_timed(evaluator, k) for k in TOP_KS] for _ in range(rounds)]


def _timed(evaluator: Evaluator, k: int) -> Row:
    start = time.process_time()
    row = evaluator.at(k)
    return {**row, "tokens_per_second": row["tokens"] / (time.process_time() - start)}


def _rows(rounds: List[List[Row]]) -> List[List[Any]]:
    speed = medians({k: [of[place]["tokens_per_second"] for of in rounds] for place, k in enumerate(TOP_KS)})
    flops = {row["top_k"]: row["flops_per_token"] for row in rounds[0]}
    head = ["k", "tokens/s", "MFLOPs/token", f"faster than k={EXPERTS}", "FLOPs promise", "share of the promise"]
    rows: List[List[Any]] = [head]
    for k in TOP_KS:
        faster, promised = speed[k] / speed[EXPERTS], flops[EXPERTS] / flops[k]
        rows.append([k, f"{speed[k]:,.0f}", flops[k] / 1e6, faster, promised, faster / promised])
    return rows


def _title(model: Model, data: str) -> str:
    symbols = f"{len(Path(data, 'dict.txt').read_text().splitlines())} symbols"
    batch = f"{model.samples} samples of {model.tokens} tokens per batch"
    return f"fairseq-eval-lm on the test split, {symbols}, {batch}, {model.size}"


if __name__ == "__main__":
    main()
