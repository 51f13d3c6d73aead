"""Quantised weights as compressed-tensors stores them, for vLLM and transformers; told without torch.

    w8a8    int8, one scale a row; vLLM makes the activations int8 too, token by token
    fp8     float8 E4M3, likewise
    w8a16   int8, one scale a row, packed into int32
    w4a16   int4, one scale a group of columns, packed into int32

The names are compressed-tensors' own presets: bits of a weight, bits of an activation. A scale is in the model's dtype,
as is the layer that a reader makes of it.
"""

from __future__ import annotations

import math
import struct
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

from adapterhub.errors import UsageError

GROUPS = (128, 64, 32)  # columns under one scale: what the kernels of vLLM have
_MEANT = {"int8": "w8a8 or w8a16", "int4": "w4a16", "4bit": "w4a16", "8bit": "w8a8 or w8a16", "float8": "fp8"}
_OF_OTHERS = {"gptq", "awq", "bnb", "nf4", "gguf", "q8_0", "q4_k_m"}


@dataclass(frozen=True)
class Part:
    """One tensor of the new file."""

    name: str
    dtype: str  # safetensors' name
    shape: tuple[int, ...]
    size: int  # bytes
    constant: bytes = b""  # what it holds, where the plan knows


@dataclass(frozen=True)
class Scheme:
    """How the weight of a linear layer, (rows, columns), is stored."""

    name: str
    form: str  # compressed-tensors' format
    bits: int
    kind: Literal["int", "float"]
    activations: bool  # whether they are quantised, too, when the model runs
    group: int = 0  # columns under one scale; 0: a whole row

    @property
    def told(self) -> str:
        """For people: ``w4a16 in groups of 64``."""
        return f"{self.name} in groups of {self.group}" if self.group else self.name

    @property
    def packed(self) -> bool:
        return self.form == "pack-quantized"

    def groups(self, columns: int) -> int:
        """Scales of one row."""
        return columns // self.group if self.group else 1

    def row_size(self, columns: int) -> int:
        """Bytes of one row's codes: packed ones fill whole int32."""
        return 4 * math.ceil(columns * self.bits / 32) if self.packed else columns

    def parts(self, name: str, shape: tuple[int, ...], dtype: str, width: int) -> tuple[Part, ...]:
        """The codes, the scales and, of packed codes, the shape. ``dtype``, ``width``: of the scales; in bytes."""
        (rows, columns), groups = shape, self.groups(shape[1])
        size = rows * self.row_size(columns)
        scales = Part(f"{name}_scale", dtype, (rows, groups), rows * groups * width)
        if not self.packed:
            return Part(name, "I8" if self.kind == "int" else "F8_E4M3", shape, size), scales
        words = Part(f"{name}_packed", "I32", (rows, size // rows // 4), size)
        return words, scales, Part(f"{name}_shape", "I64", (2,), 16, struct.pack("<2q", rows, columns))

    def config(self, ignore: Sequence[str]) -> dict[str, Any]:
        """``quantization_config`` of the model's config. ``ignore``: linear layers that are not quantised."""
        weights = _arguments(self.bits, self.kind, "group" if self.group else "channel", dynamic=False)
        tokens = _arguments(self.bits, self.kind, "token", dynamic=True) if self.activations else None
        group = {
            "targets": ["Linear"],
            "weights": weights | {"group_size": self.group or None},
            "input_activations": tokens,
            "output_activations": None,
            "format": self.form,
        }
        return {
            "quant_method": "compressed-tensors",
            "format": self.form,
            "quantization_status": "compressed",
            "config_groups": {"group_0": group},
            "ignore": list(ignore),
            "kv_cache_scheme": None,
            "global_compression_ratio": None,
        }


def _arguments(bits: int, kind: str, strategy: str, *, dynamic: bool) -> dict[str, Any]:
    shared = {"num_bits": bits, "type": kind, "strategy": strategy, "symmetric": True, "dynamic": dynamic}
    return shared | {"group_size": None, "block_structure": None, "actorder": None}


SCHEMES: Mapping[str, Scheme] = {
    "w8a8": Scheme("w8a8", "int-quantized", 8, "int", activations=True),
    "w8a16": Scheme("w8a16", "pack-quantized", 8, "int", activations=False),
    "w4a16": Scheme("w4a16", "pack-quantized", 4, "int", activations=False, group=GROUPS[0]),
    "fp8": Scheme("fp8", "float-quantized", 8, "float", activations=True),
}


def find_scheme(name: str, group: int | None) -> Scheme:
    """What ``--quantize`` and ``--group-size`` say. Raises UsageError."""
    scheme = SCHEMES.get(name.lower())
    if scheme is None:
        meant = _MEANT.get(name.lower())
        why = "it is another tool's" if name.lower() in _OF_OTHERS else ""
        hint = f"--quantize {meant}" if meant else f"--quantize {', '.join(SCHEMES)}"
        raise UsageError(f"{name!a} is no way to quantise a model here", why=why, hint=hint)
    if group is None:
        return scheme
    if not scheme.group:
        raise UsageError(
            f"--group-size is not for {scheme.name}", why="it has one scale a row", hint="leave it out, or take w4a16"
        )
    if group not in GROUPS:
        raise UsageError(
            f"a group of {group} columns is not one that vLLM computes with",
            hint=f"--group-size {', '.join(map(str, GROUPS))}",
        )
    return replace(scheme, group=group)
