"""Memory: what this machine has, beside what the plan says of a training."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from adapterhub.errors import AdapterHubError
from adapterhub.trainers.config import TrainConfig
from adapterhub.trainers.planning.memory import GB
from adapterhub.trainers.planning.plan import plan

_MEMORY = Path("/proc/meminfo")
_LIMIT = Path("/sys/fs/cgroup/memory.max")  # of a container, cgroup version 2


@dataclass(frozen=True)
class Room:
    """Free bytes, and whose they are."""

    free: int
    gpu: bool = False

    @property
    def owner(self) -> str:
        return "the GPU" if self.gpu else "this machine"


def room() -> Room | None:
    """Free memory of the first GPU, else of the machine or its container; None where nobody says."""
    if Path("/dev/nvidiactl").exists():
        import torch

        if torch.cuda.is_available():
            return Room(torch.cuda.mem_get_info()[0], gpu=True)
    try:
        lines = dict(line.split(":") for line in _MEMORY.read_text().splitlines())
        free = int(lines["MemAvailable"].split()[0]) * 1024
        limit = _LIMIT.read_text().strip() if _LIMIT.is_file() else "max"
    except (OSError, KeyError, ValueError):
        return None
    return Room(free if limit == "max" else min(free, int(limit)))


def too_little(config: TrainConfig, base_config: Mapping[str, Any], found: Room | None) -> str | None:
    """A warning where the plan is more than there is, with the cheapest settings that fit; else None."""
    if found is None:
        return None
    try:
        needed = plan(config, base_config, gpu=found.gpu, limit=found.free)
    except AdapterHubError:  # a base that cannot be planned can still be trained
        return None
    if needed.memory.total <= found.free:
        return None
    fits = ", ".join(f"{key}: {str(value).lower()}" for key, value in (needed.fits or {}).items())
    return (
        f"about {needed.memory.total / GB:.1f} GB are needed, and {found.owner} has {found.free / GB:.1f} GB free; "
        + (f"this fits: {fits}" if fits else "lower sequence_len or lora_r, or take a smaller base")
    )
