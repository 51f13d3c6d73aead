"""How a merged safetensors file is laid out: what happens to each tensor, and where it goes. No torch.

Where no tensor changes its dtype the new file has the header and the offsets of the old one, byte for byte, so that
everything between the merged tensors can be cloned. Where one does (`--dtype`), a new header is made first and the
tensors follow it in the old order. Either way every size is known before the first byte is written.
"""

from __future__ import annotations

import json
import struct
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from adapterhub.peftdir import Factor, Tensor

DTYPES = {"float32": "F32", "float16": "F16", "bfloat16": "BF16"}  # what can be merged and written
WIDTH = {"F32": 4, "F16": 2, "BF16": 2}  # bytes
BLOCK = 2**20  # elements read, computed and written at once: 2 to 4 MiB, which the caches hold


@dataclass(frozen=True)
class Delta:
    """What is added to a tensor: scale · B·A, or its transpose where the layer keeps its weight as (in, out)."""

    factor: Factor
    transposed: bool = False


@dataclass(frozen=True)
class Operation:
    """What happens to one tensor: kept as it is, cast, or merged (and cast)."""

    source: Tensor
    dtype: str  # in the new file, safetensors' name
    start: int  # in the new file, bytes from its start
    delta: Delta | None = None

    @property
    def kept(self) -> bool:
        return self.delta is None and self.dtype == self.source.dtype

    @property
    def elements(self) -> int:
        return (self.source.end - self.source.start) // WIDTH[self.source.dtype]

    @property
    def size(self) -> int:
        """Bytes in the new file."""
        return self.source.end - self.source.start if self.kept else self.elements * WIDTH[self.dtype]


@dataclass(frozen=True)
class FilePlan:
    """One weight file of the base, and what becomes of it."""

    source: Path
    name: str
    header: bytes  # of the new file: length and JSON
    size: int  # bytes of the new file
    operations: tuple[Operation, ...]  # in file order
    same_layout: bool  # header and offsets are the source's


@dataclass(frozen=True)
class Copy:
    """Bytes that go over as they are."""

    source: int  # offset
    target: int  # offset
    length: int


@dataclass(frozen=True)
class Rows:
    """Rows ``first`` to ``last`` of a tensor that is merged or cast; a cast one counts as one column."""

    operation: Operation
    first: int
    last: int  # exclusive
    columns: int

    @property
    def source(self) -> int:
        return self.operation.source.start + self.first * self.columns * WIDTH[self.operation.source.dtype]

    @property
    def target(self) -> int:
        return self.operation.start + self.first * self.columns * WIDTH[self.operation.dtype]

    @property
    def elements(self) -> int:
        return (self.last - self.first) * self.columns


def lay_out(source: Path, tensors: list[Tensor], deltas: Mapping[str, Delta], dtype: str | None) -> FilePlan:
    """Plan one file. ``tensors`` in file order; ``dtype`` is safetensors' name, None keeps each tensor's own."""
    dtypes = {t.name: dtype if dtype and t.dtype in WIDTH else t.dtype for t in tensors}
    with source.open("rb") as file:
        length = file.read(8)
        header = length + file.read(struct.unpack("<Q", length)[0])
    if all(dtypes[t.name] == t.dtype for t in tensors):
        kept = tuple(Operation(t, t.dtype, t.start, deltas.get(t.name)) for t in tensors)
        return FilePlan(source, source.name, header, source.stat().st_size, kept, same_layout=True)
    header, starts, size = _new_header(json.loads(header[8:]), tensors, dtypes)
    moved = tuple(Operation(t, dtypes[t.name], starts[t.name], deltas.get(t.name)) for t in tensors)
    return FilePlan(source, source.name, header, size, moved, same_layout=False)


def blocks(plan: FilePlan, *, cloned: bool = False, size: int = BLOCK) -> Iterator[Copy | Rows]:
    """All work on one file, in file order. ``cloned``: the kept bytes are there already. ``size`` in elements."""
    if plan.same_layout:
        done = 0
        for operation in plan.operations:
            if not operation.kept:
                if not cloned:
                    yield from _copies(done, done, operation.start - done, size)
                yield from _rows(operation, size)
                done = operation.start + operation.size
        if not cloned:
            yield from _copies(done, done, plan.size - done, size)
        return
    for operation in plan.operations:
        if operation.kept:
            yield from _copies(operation.source.start, operation.start, operation.size, size)
        else:
            yield from _rows(operation, size)


def _copies(source: int, target: int, length: int, size: int) -> Iterator[Copy]:
    step = 4 * size
    for done in range(0, length, step):
        yield Copy(source + done, target + done, min(step, length - done))


def _rows(operation: Operation, size: int) -> Iterator[Rows]:
    count, columns = operation.source.shape if operation.delta else (operation.elements, 1)
    step = max(1, size // max(1, columns))
    for first in range(0, count, step):
        yield Rows(operation, first, min(first + step, count), columns)


def _new_header(
    old: Mapping[str, object], tensors: list[Tensor], dtypes: Mapping[str, str]
) -> tuple[bytes, dict[str, int], int]:
    """The header, where each tensor starts, and the file's size. Tensors stand without gaps, as the format demands."""
    entries: dict[str, object] = {"__metadata__": old["__metadata__"]} if "__metadata__" in old else {}
    spans, end = {}, 0
    for tensor in tensors:
        start, end = end, end + _size(tensor, dtypes[tensor.name])
        spans[tensor.name] = start
        entries[tensor.name] = {
            "dtype": dtypes[tensor.name],
            "shape": list(tensor.shape),
            "data_offsets": [start, end],
        }
    text = json.dumps(entries, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    offset = 8 + len(text)
    return struct.pack("<Q", len(text)) + text, {n: offset + s for n, s in spans.items()}, offset + end


def _size(tensor: Tensor, dtype: str) -> int:
    size = tensor.end - tensor.start
    return size if dtype == tensor.dtype else size // WIDTH[tensor.dtype] * WIDTH[dtype]
