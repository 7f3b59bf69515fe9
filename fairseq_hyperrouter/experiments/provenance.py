"""What a training is made by: this package, at which commit, on which machine."""

import subprocess
from importlib import metadata
from pathlib import Path
from typing import Any, Dict, Optional

import torch

from fairseq_hyperrouter.analysis.machine import hardware

PACKAGE = Path(__file__).parents[1]


def provenance(cpu: bool) -> Dict[str, Any]:
    """Of a training that starts now, as JSON takes it.

    version   of this package; None where it is not installed
    commit    of the git checkout that the package is in; None where it is in none
    dirty     whether files of the package are others than those of the commit
    machine   the GPU, or the CPU
    torch     its version
    cpu       whether --cpu was given, which is *cpu*
    """
    try:
        version = metadata.version("fairseq-hyperrouter")
    except metadata.PackageNotFoundError:
        version = None
    # A package that is installed may lie in the folder of another project's checkout.
    is_checkout = _git("ls-files", "--error-unmatch", "__init__.py") is not None
    return {
        "version": version,
        "commit": _git("rev-parse", "HEAD") if is_checkout else None,
        "dirty": bool(_git("status", "--porcelain", "--", ".")) if is_checkout else None,
        "machine": hardware(cpu),
        "torch": torch.__version__,
        "cpu": cpu,
    }


def software_of(record: Dict[str, Any]) -> str:
    """The version and the commit of a record, in words."""
    commit = f" at {record['commit'][:10]}{', changed' * record['dirty']}" if record["commit"] else ""
    return f"{record['version'] or 'not installed'}{commit}"


def machine_of(record: Dict[str, Any]) -> str:
    """The machine and the version of torch of a record, in words."""
    return f"{record['machine']}, torch {record['torch']}"


def _git(*arguments: str) -> Optional[str]:
    """What it prints in the package's folder; None where it fails, or there is no git."""
    try:
        command = ["git", "--no-optional-locks", "-C", str(PACKAGE), *arguments]
        done = subprocess.run(command, capture_output=True, text=True)
    except OSError:
        return None
    return done.stdout.strip() if done.returncode == 0 else None
