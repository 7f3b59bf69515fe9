"""Which machine numbers were made on."""

import os
import platform
from pathlib import Path

import torch


def processor() -> str:
    """The CPU's name."""
    cpuinfo = Path("/proc/cpuinfo")
    for line in cpuinfo.read_text().splitlines() if cpuinfo.exists() else ():
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def machine() -> str:
    """The GPU, or the CPU and its cores, and the version of torch."""
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else f"{processor()}, {os.cpu_count()} cores"
    return f"{device}, torch {torch.__version__}"
