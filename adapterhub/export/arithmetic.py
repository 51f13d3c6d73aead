"""The sum itself: float32 W + scale · B·A, rounded once. The only file of the export that knows torch.

Every block is widened to float32, whatever dtype the base and the factors have, added to, and rounded once (to nearest,
ties to even). A product that is rounded to bfloat16 before it is added puts 5 % of the weights one step off.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from adapterhub.errors import Unsupported
from adapterhub.export.files import read_at
from adapterhub.export.layout import Delta, Rows
from adapterhub.export.unpack import read_rows
from adapterhub.peftdir import Tensor


@dataclass(frozen=True)
class Product:
    """A delta ready to add, in float32: ΔW = scale · left @ right, left (rows, rank), right (rank, columns)."""

    left: Any  # torch.Tensor
    right: Any  # torch.Tensor
    scale: float


def product(delta: Delta, weights: Path) -> Product:
    """Read a delta's two factors from the adapter's weight file."""
    a, b = read_float32(delta.factor.a, weights), read_float32(delta.factor.b, weights)
    left, right = (a.T.contiguous(), b.T.contiguous()) if delta.transposed else (b, a)
    return Product(left, right, delta.factor.scale)


def rewrite(rows: Rows, delta: Product | None) -> memoryview:
    """The new bytes of a block; they lie in this thread's buffers, and stay until its next block.

    Raises Unsupported where float16 cannot hold a value.
    """
    import torch

    raw, dtype = read_rows(rows, lambda size: memoryview(_room("raw", size).numpy()))
    old = torch.frombuffer(raw, dtype=_dtype(dtype), count=rows.elements)
    wide = _room("wide", 4 * rows.elements).view(torch.float32)
    block = wide.copy_(old).view(-1, rows.columns)
    if delta is not None:
        block.addmm_(delta.left[rows.first : rows.last], delta.right, alpha=delta.scale)
    new = wide
    if rows.operation.dtype != "F32":
        new = _room("narrow", 2 * rows.elements).view(_dtype(rows.operation.dtype)).copy_(wide)
    if new.dtype == torch.float16 and bool(new.isinf().any()) and not bool(block.isinf().any()):
        raise Unsupported(
            f"{rows.operation.source.name} does not fit float16",
            why=f"it holds {float(block.abs().max()):.3g}, float16 ends at 65504",
            hint="export with --dtype bfloat16 or float32",
        )
    return memoryview(new.view(torch.uint8).numpy())


class _Rooms(threading.local):
    """Each worker's own buffers, used again for every block: fresh ones are pages that the kernel must clear first."""

    def __init__(self) -> None:
        self.held: dict[str, Any] = {}


_rooms = _Rooms()


def _room(name: str, size: int) -> Any:
    """A buffer of ``size`` bytes, aligned as torch likes it."""
    import torch

    if name not in _rooms.held or len(_rooms.held[name]) < size:
        _rooms.held[name] = torch.empty(size, dtype=torch.uint8)
    return _rooms.held[name][:size]


@contextmanager
def one_thread_a_block() -> Iterator[None]:
    """Blocks run side by side, so torch must not split each one again; nor may it round products to bfloat16."""
    import torch

    threads, precision = torch.get_num_threads(), torch.get_float32_matmul_precision()
    torch.set_num_threads(1)
    torch.set_float32_matmul_precision("highest")
    try:
        yield
    finally:
        torch.set_num_threads(threads)
        torch.set_float32_matmul_precision(precision)


def read_float32(tensor: Tensor, file: Path) -> Any:
    """One tensor of a safetensors file, as float32."""
    import torch

    raw = read_at(file, tensor.start, tensor.end - tensor.start)
    return torch.frombuffer(raw, dtype=_dtype(tensor.dtype)).view(tensor.shape).to(torch.float32)


def _dtype(name: str) -> Any:
    import torch

    return {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}[name]
