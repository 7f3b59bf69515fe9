"""Every routing method trained on the same text with the same budget.

python -m benchmarks.routers DATA [--updates N] [--quick]      (DATA: a folder made by fairseq-preprocess)
"""

import json
import logging
import re
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any, Dict, List

from fairseq_hyperrouter.analysis.sweep import sweep
from fairseq_hyperrouter.routing import ROUTERS

from .commands import USER_DIR, one_thread
from .harness import parser, progress, report

TOP_KS = (1, 2, 4, 8, 16)
MODEL = [
    *("--task", "hyperrouter", "--arch", "transformer_lm_hyperrouter", "--criterion", "moe_cross_entropy"),
    *("--decoder-layers", "4", "--decoder-embed-dim", "64", "--decoder-ffn-embed-dim", "128", "--dropout", "0.1"),
    *("--decoder-input-dim", "64", "--decoder-output-dim", "64", "--decoder-attention-heads", "4"),
    *("--share-decoder-input-output-embed", "--moe-expert-count", "16"),
]
TRAINING = [
    *("--optimizer", "adam", "--lr", "0.001", "--clip-norm", "0.25", "--tokens-per-sample", "128", "--batch-size", "8"),
    *("--cpu", "--num-workers", "0", "--log-format", "json", "--log-interval", "50", "--no-epoch-checkpoints"),
    *("--required-batch-size-multiple", "1"),
]
BALANCED = ["--moe-gate-loss-wt", "0.01"]
METHODS: Dict[str, List[str]] = {
    "smoe": ["--moe-router", "smoe"],
    "smoe, balance loss": ["--moe-router", "smoe", *BALANCED],
    "smoe, loss-free": ["--moe-router", "smoe", "--moe-loss-free-rate", "0.001"],
    "smoe, elastic k to 16": ["--moe-router", "smoe", "--moe-top-k", "16", "--moe-top-k-schedule", "elastic"],
    "hyperrouter": ["--moe-router", "hyperrouter"],
    "smoe-dropout": ["--moe-router", "smoe-dropout"],
    "switch, k = 1": ["--moe-router", "switch", "--moe-top-k", "1", *BALANCED],
    "gshard": ["--moe-router", "gshard", *BALANCED],
    "noisy-top-k": ["--moe-router", "noisy-top-k"],
    "cosine": ["--moe-router", "cosine", *BALANCED],
    "hash": ["--moe-router", "hash"],
    "base, k = 1": ["--moe-router", "base", "--moe-top-k", "1"],
    "stable, k = 1": ["--moe-router", "stable", "--moe-top-k", "1"],
    "recurrent": ["--moe-router", "recurrent", *BALANCED],
    "compete": ["--moe-router", "compete"],
    "relu": ["--moe-router", "relu"],
    "smoe, HyperMoE's adapter": ["--moe-router", "smoe", "--moe-adapter-dim", "16"],
    "smoe, SimSMoE's penalty": ["--moe-router", "smoe", "--moe-similarity-wt", "0.1"],
    "smoe, DS-MoE": ["--moe-router", "smoe", "--moe-top-k", "16", "--moe-mi-loss-wt", "0.01"],
}


def main() -> None:
    """Train, evaluate, print and write the table."""
    options = parser(__doc__)
    options.add_argument("data", help="folder made by fairseq-preprocess")
    options.add_argument("--updates", type=int, default=500, help="of 1,024 tokens (default: %(default)s)")
    args = options.parse_args()
    logging.disable(logging.WARNING)
    updates = 2 if args.quick else args.updates
    head = ["perplexity at k =", *TOP_KS, "router entropy", "load imbalance", "training tokens/s"]
    rows, details = [head], {}
    for name, chosen in progress(list(METHODS.items()), "methods"):
        with tempfile.TemporaryDirectory() as folder:
            last = _train([args.data, *MODEL, *chosen, *TRAINING, "--max-update", str(updates), "--save-dir", folder])
            swept = list(sweep([Path(folder, "checkpoint_last.pt")], args.data, TOP_KS, batch_size=16, cpu=True))
        perplexity = {row["top_k"]: row["perplexity"] for row in swept}
        measured = [last["valid_moe_router_entropy"], last["valid_moe_load_imbalance"]]
        rows.append([name, *(perplexity[k] for k in TOP_KS), *measured, f"{last['train_wps']:,.0f}"])
        details[name] = {"options": chosen, "log": last, "sweep": swept}
    title = f"{updates} updates of 1,024 tokens, 4 layers, d 64, F 128, E 16, k = 2 in training unless said, one seed"
    assert {row.split(",")[0] for row in METHODS} == {n for n, router in ROUTERS.items() if not router.looks_ahead}
    report("routers", {title: rows}, details)


def _train(arguments: List[str]) -> Dict[str, float]:
    """What the training logged last, of training and of validation."""
    command = [sys.executable, "-m", "fairseq_cli.train", *arguments, "--user-dir", str(USER_DIR)]
    done = subprocess.run(command, env=one_thread(), capture_output=True, text=True)
    if done.returncode:
        sys.exit(done.stderr[-3000:])
    logged: Dict[str, Any] = {}
    for line in re.findall(r"\| (?:train|valid) \| (\{.*\})", done.stdout + done.stderr):
        logged.update(json.loads(line))
    return {key: float(value) for key, value in logged.items() if value is not None}


if __name__ == "__main__":
    main()
