"""Which of fairseq's commands this process is."""

import os
import sys


def running_command() -> str:
    """Which of fairseq's commands this program is, as in "train" or "eval_lm"; "" when it is none."""
    program = sys.modules["__main__"].__spec__
    if program is not None and program.parent == "fairseq_cli":  # python -m fairseq_cli.train
        return program.name.rpartition(".")[2]
    name = os.path.basename(sys.argv[0])
    return name[len("fairseq-") :].replace("-", "_") if name.startswith("fairseq-") else ""
