"""The fairseq commands whose time is taken, each in a process of its own."""

import os
import resource
import subprocess
import sys
from pathlib import Path
from typing import Dict, List

USER_DIR = Path(__file__).parents[1] / "fairseq_hyperrouter"
WIDTH, HIDDEN, EXPERTS, LAYERS = 256, 512, 16, 4
COMMON = [
    *("--user-dir", str(USER_DIR), "--cpu", "--num-workers", "0", "--no-save", "--disable-validation"),
    *("--decoder-layers", str(LAYERS), "--decoder-embed-dim", str(WIDTH), "--decoder-attention-heads", "8"),
    *("--decoder-input-dim", str(WIDTH), "--decoder-output-dim", str(WIDTH), "--share-decoder-input-output-embed"),
    *("--optimizer", "adam", "--lr", "1e-4", "--clip-norm", "0.25"),
    *("--log-format", "simple", "--log-interval", "1000000"),
]


def experts(router: str, k: int) -> List[str]:
    """The options of the model with experts."""
    return [
        *("--task", "hyperrouter", "--arch", "transformer_lm_hyperrouter", "--criterion", "moe_cross_entropy"),
        *("--decoder-ffn-embed-dim", str(HIDDEN), "--moe-expert-count", str(EXPERTS), "--moe-top-k", str(k)),
        *("--moe-router", router),
    ]


def one_thread() -> Dict[str, str]:
    """The environment of a command that is timed."""
    return {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore"}


def cpu_seconds(arguments: List[str]) -> float:
    """Of one fairseq-train, in a process of its own."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    done = subprocess.run(
        [sys.executable, "-m", "fairseq_cli.train", *arguments], env=one_thread(), capture_output=True, text=True
    )
    if done.returncode:
        sys.exit(done.stderr[-3000:])
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
