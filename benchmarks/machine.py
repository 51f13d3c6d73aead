"""What a benchmark ran on, in one line: figures mean nothing without it."""

from __future__ import annotations

import os
import platform
from pathlib import Path


def machine() -> str:
    """``"AMD EPYC, 2 cores, 23 GiB, no GPU"``."""
    parts = [_cpu(), f"{os.cpu_count()} cores", f"{_memory_gib()} GiB", _gpu() or "no GPU"]
    return ", ".join(parts)


def _cpu() -> str:
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def _memory_gib() -> int:
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // 2**30


def _gpu() -> str:
    names = Path("/proc/driver/nvidia/gpus").glob("*/information")
    for file in names:
        for line in file.read_text().splitlines():
            if line.startswith("Model"):
                return line.partition(":")[2].strip()
    return ""
