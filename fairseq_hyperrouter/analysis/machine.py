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


def hardware(cpu: bool = False) -> str:
    """The GPU, or the CPU and its cores where there is none, or with *cpu* it is not used."""
    if torch.cuda.is_available() and not cpu:
        return torch.cuda.get_device_name()
    return f"{processor()}, {os.cpu_count()} cores"


def machine(cpu: bool = False) -> str:
    """The hardware and the version of torch."""
    return f"{hardware(cpu)}, torch {torch.__version__}"
