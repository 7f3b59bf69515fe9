"""Tokens per second of fairseq-train on a GPU, beside stock transformer_lm with as many active FLOPs.

python -m benchmarks.gpu.trainer DATA [--quick]      (DATA: a folder made by fairseq-preprocess)
"""

import json
import re
import statistics
import subprocess
import sys
from typing import Any, Dict, List, NamedTuple, Sequence

import torch

from ..commands import USER_DIR
from ..harness import parser, progress, report

BF16, AMP, FP16 = ("--bf16",), ("--amp",), ("--fp16", "--memory-efficient-fp16")


class Model(NamedTuple):
    """Its size, the batch, and what is measured of it."""

    name: str
    layers: int
    moe_layers: str
    D: int
    hidden: int
    heads: int
    samples: int
    tokens: int
    cases: Sequence[Any]
    """(experts per token, options of the precision)"""


EXPERTS = 16
SMALL = Model("the paper's small", 4, "0,1,2,3", 256, 512, 8, 22, 512, [(1, BF16), (2, BF16), (8, BF16)])
SMALL = SMALL._replace(cases=[*SMALL.cases, (2, AMP), (2, FP16)])
LARGE = Model("the paper's large", 18, "0,1,2,3", 256, 512, 8, 22, 512, [(2, BF16)])
BILLION = Model("a billion parameters", 12, "1,3,5,7,9,11", 1024, 4096, 16, 16, 1024, [(2, BF16), (2, AMP), (2, FP16)])
TINY = Model("a tiny one", 2, "0,1", 16, 32, 2, 2, 32, [(1, ()), (2, ())])


def stock(model: Model, k: int) -> List[str]:
    """Options of the dense model: k F where the other has experts, F elsewhere; stock has one width for all layers."""
    sparse = len(model.moe_layers.split(","))
    hidden = round(model.hidden * (k * sparse + model.layers - sparse) / model.layers)
    arch = ("--arch", "transformer_lm", "--task", "language_modeling", "--criterion", "cross_entropy")
    return [*_size(model), *arch, "--decoder-ffn-embed-dim", str(hidden)]


def experts(model: Model, k: int, router: str = "hyperrouter") -> List[str]:
    """Options of the model with experts."""
    return [
        *_size(model),
        *("--task", "hyperrouter", "--arch", "transformer_lm_hyperrouter", "--criterion", "moe_cross_entropy"),
        *("--decoder-ffn-embed-dim", str(model.hidden), "--moe-layers", model.moe_layers, "--moe-router", router),
        *("--moe-expert-count", str(EXPERTS), "--moe-top-k", str(k)),
    ]


def _size(model: Model) -> List[str]:
    sizes = [f"--decoder-{name}-dim" for name in ("embed", "input", "output")]
    return [
        *("--user-dir", str(USER_DIR), "--share-decoder-input-output-embed"),
        *("--decoder-layers", str(model.layers), "--decoder-attention-heads", str(model.heads)),
        *(part for option in sizes for part in (option, str(model.D))),
        *("--tokens-per-sample", str(model.tokens), "--batch-size", str(model.samples)),
    ]


def main() -> None:
    """Measure, print and write the table."""
    options = parser(__doc__)
    options.add_argument("data", help="folder made by fairseq-preprocess")
    options.add_argument("--updates", type=int, default=80, help="of every training (default: %(default)s)")
    args = options.parse_args()
    updates = 4 if args.quick else args.updates
    rows: List[List[Any]] = [["model", "precision", "k", "stock, tokens/s", "hyperrouter, tokens/s", "ratio"]]
    details = {}
    cases = [(model, *case) for model in ((TINY,) if args.quick else (SMALL, LARGE, BILLION)) for case in model.cases]
    for model, k, precision in progress(cases, "trainings"):
        speeds: Dict[str, float] = {}
        for name, own in (("stock", stock(model, k)), ("hyperrouter", experts(model, k))):
            speeds[name] = tokens_per_second([args.data, *own, *precision], updates)
        what = " ".join(precision) or "float32"
        rows.append(
            [model.name, what, k, *(f"{v:,.0f}" for v in speeds.values()), speeds["hyperrouter"] / speeds["stock"]]
        )
        details[f"{model.name}, {what}, k = {k}"] = speeds
    report("gpu.trainer", {"fairseq-train, Adam, E 16": rows}, details)


def tokens_per_second(arguments: Sequence[str], updates: int) -> float:
    """Of one fairseq-train: the median over the second half of its updates, as it logs them."""
    on_cpu = [] if torch.cuda.is_available() else ["--cpu"]
    common = [
        *("--optimizer", "adam", "--lr", "1e-4", "--clip-norm", "0.25", "--no-save", "--disable-validation"),
        *("--num-workers", "1", "--required-batch-size-multiple", "1"),
        *("--log-format", "json", "--log-interval", str(max(1, updates // 16)), "--max-update", str(updates)),
    ]
    command = [sys.executable, "-m", "fairseq_cli.train", *arguments, *common, *on_cpu]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        print(f"{' '.join(arguments)}: left out\n{done.stderr[-2000:]}")
        return float("nan")
    logged = [json.loads(line) for line in re.findall(r"\| train_inner \| (\{.*\})", done.stdout + done.stderr)]
    speeds = [float(line["wps"]) for line in logged]
    return statistics.median(speeds[len(speeds) // 2 :])


if __name__ == "__main__":
    main()
