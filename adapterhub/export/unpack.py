"""The values of stored rows, in float32: what the layer of a quantised base computes with. numpy, no torch.

nf4, fp4   quant_map[4 bits] · absmax of its block of 64, rounded to the dtype in its quant_state; the absmax may be
           quantised itself: quant_map[8 bits] · absmax of 256 of them + an offset (QLoRA, arXiv:2305.14314, 3)
int8       value · SCB of its row / 127 (LLM.int8, arXiv:2208.07339, 2.1)
fp8        value · scale of its block, its row or the tensor
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from adapterhub.export.files import read_at, read_into
from adapterhub.export.layout import WIDTH, Rows
from adapterhub.export.packing import Packing
from adapterhub.peftdir import Tensor

Array = npt.NDArray[Any]
OldRows = tuple[memoryview, str]


def read_rows(rows: Rows, room: Callable[[int], memoryview] = lambda size: memoryview(bytearray(size))) -> OldRows:
    """The old values of a block, and their dtype: as they are stored, or float32 where that is packed.

    ``room`` gives the bytes to read into, for a caller that has some.
    """
    operation = rows.operation
    if operation.packing is None:
        view = room(rows.elements * WIDTH[operation.source.dtype])
        read_into(operation.file, rows.source, view)
        return view, operation.source.dtype
    values = unpack(operation.file, operation.source, operation.packing, rows.first, rows.last)
    return np.ascontiguousarray(values, "<f4").data.cast("B"), "F32"


def unpack(file: Path, tensor: Tensor, packing: Packing, first: int, last: int) -> Array:
    """Rows ``first`` to ``last`` (exclusive) as float32 (rows, columns). ``tensor`` has the shape it stands for."""
    columns = int(np.prod(tensor.shape[1:], dtype=np.int64))
    if packing.kind in {"nf4", "fp4"}:
        return _four_bits(file, tensor, packing, first * columns, last * columns).reshape(-1, columns)
    raw = read_at(file, tensor.start + first * columns, (last - first) * columns)
    if packing.kind == "int8":
        scale = _part(packing, "scale")[first:last, None]
        return np.frombuffer(raw, np.int8).reshape(-1, columns) * scale * np.float32(1 / 127)
    values = float8_values(tensor.dtype)[np.frombuffer(raw, np.uint8)].reshape(-1, columns)
    return values * _scales(packing, first, last, columns) if packing.parts else values


def round_to(values: Array, dtype: str) -> Array:
    """float32 values rounded to F16 or BF16 (nearest, ties to even), as float32."""
    if dtype == "F32":
        return values
    if dtype == "F16":
        return values.astype("<f2").astype("<f4")
    bits = np.ascontiguousarray(values, "<f4").view("<u4")
    rounded: Array = ((bits + 0x7FFF + ((bits >> 16) & 1)) & np.uint32(0xFFFF0000)).astype("<u4").view("<f4")
    return rounded


@cache
def float8_values(dtype: str) -> Array:
    """The 256 values of F8_E4M3 (no infinity, NaN at the end) or F8_E5M2 (as IEEE 754). arXiv:2209.05433, table 1."""
    codes = np.arange(256)
    digits, bias = (3, 7) if dtype == "F8_E4M3" else (2, 15)
    exponent, fraction = (codes & 0x7F) >> digits, (codes & (2**digits - 1)) / 2**digits
    values = np.where(exponent == 0, np.ldexp(fraction, 1 - bias), np.ldexp(1 + fraction, exponent - bias))
    top = 2 ** (7 - digits) - 1
    if dtype == "F8_E4M3":
        values = np.where((codes & 0x7F) == 0x7F, np.nan, values)
    else:
        values = np.where(exponent == top, np.where(fraction == 0, np.inf, np.nan), values)
    return np.where(codes < 128, values, -values).astype("<f4")


def _four_bits(file: Path, tensor: Tensor, packing: Packing, start: int, end: int) -> Array:
    """Elements ``start`` to ``end`` of the flattened tensor; two lie in a byte, the first in its high half."""
    raw = np.frombuffer(read_at(file, tensor.start + start // 2, (end + 1) // 2 - start // 2), np.uint8)
    codes = np.stack([raw >> 4, raw & 0x0F], axis=1).reshape(-1)[start % 2 :][: end - start]
    block = packing.block[1]
    first = start // block
    absmax = _absmax(packing, first, -(-end // block))
    of_each = np.repeat(absmax, block)[start - first * block :][: end - start]
    return round_to(_part(packing, "quant_map")[codes] * of_each, packing.dtype)


def _absmax(packing: Packing, first: int, last: int) -> Array:
    stored = _part(packing, "absmax", first, last)
    if "nested_absmax" not in packing.parts:
        return stored
    scale = _part(packing, "nested_absmax")[np.arange(first, last) // packing.nested_block]
    absmax: Array = _part(packing, "nested_quant_map")[stored] * scale + np.float32(packing.nested_offset)
    return absmax


def _scales(packing: Packing, first: int, last: int, columns: int) -> Array:
    """One scale an element, or what numpy spreads to that: (rows, columns), (rows, 1) or (1, 1)."""
    high, wide = packing.block
    scale = _part(packing, "scale")
    scale = scale.reshape(-1, -(-columns // wide))[np.arange(first, last) // high]
    return scale if scale.shape[1] == 1 else np.repeat(scale, wide, axis=1)[:, :columns]


def _part(packing: Packing, name: str, first: int = 0, last: int | None = None) -> Array:
    """Elements of one of its other tensors: bytes as they are, everything else as float32."""
    file, tensor = packing.parts[name]
    width = {"U8": 1, **WIDTH}[tensor.dtype]
    start, end = tensor.start + first * width, tensor.end if last is None else tensor.start + last * width
    raw = read_at(file, start, end - start)
    if tensor.dtype == "U8":
        return np.frombuffer(raw, np.uint8)
    if tensor.dtype == "BF16":
        return (np.frombuffer(raw, "<u2").astype("<u4") << 16).view("<f4")
    return np.frombuffer(raw, "<f4" if tensor.dtype == "F32" else "<f2").astype("<f4", copy=False)
