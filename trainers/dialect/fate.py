"""What became of a key, and the machine that it depends on."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

Kind = Literal["honoured", "approximated", "without effect"]


@dataclass(frozen=True)
class Machine:
    """What the fate of a key depends on."""

    gpu: bool = False
    bf16: bool = False  # multiplies bfloat16 in hardware: what has no such unit trains slower in it than in float32

    @classmethod
    def here(cls) -> Machine:
        """Looks before it imports torch: a machine without the driver answers at once."""
        if not Path("/dev/nvidiactl").exists():
            return cls(gpu=False, bf16=_cpu_has_bfloat16())
        import torch

        gpu = torch.cuda.is_available()
        return cls(gpu=gpu, bf16=torch.cuda.is_bf16_supported() if gpu else _cpu_has_bfloat16())


@dataclass(frozen=True)
class KeyFate:
    """What became of one key of a config. Printed before every run and kept in its folder."""

    key: str
    kind: Kind
    note: str = ""
    where: str = ""  # config.yml:3:1, or the flag


def _cpu_has_bfloat16() -> bool:
    try:
        flags = Path("/proc/cpuinfo").read_text(encoding="utf-8").split()
    except OSError:  # not Linux
        return False
    return bool({"avx512_bf16", "amx_bf16", "bf16"} & set(flags))


def shown(value: Any) -> str:
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, float):
        return f"{value:g}"
    if isinstance(value, tuple | list):
        return ", ".join(str(v) for v in value)
    if isinstance(value, dict):
        return ", ".join(f"{k}: {v}" for k, v in value.items())
    cut = str(value).replace("\n", " ")
    return cut if len(cut) <= 80 else cut[:77] + "…"
