"""How the weight files of the new model are laid out: what happens to each tensor, and where it goes. No torch.

Where all of a file's tensors keep their dtype and place, the new file has the header and the offsets of the base's,
byte for byte, so that everything between the merged tensors can be cloned. Else (`--dtype`, `--max-shard-size`, a
quantised base, a tensor more) a new header is made first and the tensors follow it without gaps. Either way every size
is known before the first byte is written.
"""

from __future__ import annotations

import json
import math
import struct
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from adapterhub.export.packing import Packing
from adapterhub.peftdir import Factor, Tensor, read_header

DTYPES = {"float32": "F32", "float16": "F16", "bfloat16": "BF16"}  # what can be merged and written
WIDTH = {"F32": 4, "F16": 2, "BF16": 2}  # bytes
BLOCK = 2**19  # elements read, computed and written at once: 1 to 2 MiB, which the caches hold


@dataclass(frozen=True)
class Delta:
    """What is added to a tensor: scale · B·A, or its transpose where the layer keeps its weight as (in, out).

    Of a factor with a magnitude (DoRA) the sum's rows, or its columns where it is transposed, then get that length.
    """

    factor: Factor
    transposed: bool = False
    bias: bool = False  # what is added is scale · B's bias, to the layer's bias

    @property
    def magnitude(self) -> Tensor | None:
        return None if self.bias else self.factor.magnitude


@dataclass(frozen=True)
class Operation:
    """What happens to one tensor: kept as it is, cast, unpacked, or merged (and cast)."""

    source: Tensor  # its name in the new model and its shape; where its bytes lie, and their dtype
    file: Path  # that holds them
    home: str  # name of the new file
    dtype: str  # in the new file, safetensors' name
    start: int = 0  # in the new file, bytes from its start
    delta: Delta | None = None
    packing: Packing | None = None  # of a quantised tensor
    saved: bool = False  # the source is the adapter's, in place of the base's

    @property
    def kept(self) -> bool:
        return self.delta is None and self.packing is None and self.dtype == self.source.dtype

    @property
    def elements(self) -> int:
        return math.prod(self.source.shape)

    @property
    def size(self) -> int:
        """Bytes in the new file."""
        return self.source.end - self.source.start if self.kept else self.elements * WIDTH[self.dtype]


@dataclass(frozen=True)
class FilePlan:
    """One weight file of the new model."""

    name: str
    header: bytes  # length and JSON
    size: int  # bytes
    operations: tuple[Operation, ...]  # in file order
    source: Path | None  # the base's file whose header and offsets it has, byte for byte

    @property
    def same_layout(self) -> bool:
        return self.source is not None


@dataclass(frozen=True)
class Copy:
    """Bytes that go over as they are."""

    file: Path
    source: int  # offset
    target: int  # offset
    length: int

    @property
    def end(self) -> int:
        """Offset behind it in the new file."""
        return self.target + self.length


@dataclass(frozen=True)
class Rows:
    """Rows ``first`` to ``last`` of a tensor that is merged, unpacked or cast; a cast one counts as one column."""

    operation: Operation
    first: int
    last: int  # exclusive
    columns: int

    @property
    def source(self) -> int:
        """Offset in a file that is not packed."""
        return self.operation.source.start + self.first * self.columns * WIDTH[self.operation.source.dtype]

    @property
    def target(self) -> int:
        return self.operation.start + self.first * self.columns * WIDTH[self.operation.dtype]

    @property
    def end(self) -> int:
        """Offset behind it in the new file."""
        return self.target + self.elements * WIDTH[self.operation.dtype]

    @property
    def elements(self) -> int:
        return (self.last - self.first) * self.columns


def lay_out(operations: Sequence[Operation], base: Mapping[str, Path]) -> tuple[FilePlan, ...]:
    """The new files, by name; tensors in the order of ``operations``. ``base``: the base's files by name."""
    homes: dict[str, list[Operation]] = {}
    for operation in operations:
        homes.setdefault(operation.home, []).append(operation)
    return tuple(_file(name, homes[name], base.get(name)) for name in sorted(homes))


def spread(operations: Sequence[Operation], largest: int) -> tuple[Operation, ...]:
    """The same tensors in the same order, in files of at most ``largest`` bytes of weights, a larger tensor in one of
    its own. Named as transformers names them."""
    numbers: list[int] = []
    filled = 0
    for operation in operations:
        new = not numbers or filled + operation.size > largest
        numbers.append((numbers[-1] + 1 if numbers else 1) if new else numbers[-1])
        filled = operation.size if new else filled + operation.size
    count = numbers[-1] if numbers else 0
    names = {n: f"model-{n:05d}-of-{count:05d}.safetensors" for n in numbers} if count > 1 else {1: "model.safetensors"}
    return tuple(replace(op, home=names[n]) for op, n in zip(operations, numbers, strict=True))


def blocks(plan: FilePlan, *, cloned: bool = False, size: int = BLOCK) -> Iterator[Copy | Rows]:
    """All work on one file, in file order. ``cloned``: the kept bytes are there already. ``size`` in elements."""
    if plan.source is not None:
        done = 0
        for operation in plan.operations:
            if not operation.kept:
                if not cloned:
                    yield from _copies(plan.source, done, done, operation.start - done, size)
                yield from _rows(operation, size)
                done = operation.start + operation.size
        if not cloned:
            yield from _copies(plan.source, done, done, plan.size - done, size)
        return
    for operation in plan.operations:
        if operation.kept:
            yield from _copies(operation.file, operation.source.start, operation.start, operation.size, size)
        else:
            yield from _rows(operation, size)


def _copies(file: Path, source: int, target: int, length: int, size: int) -> Iterator[Copy]:
    step = 8 * size
    for done in range(0, length, step):
        yield Copy(file, source + done, target + done, min(step, length - done))


def _rows(operation: Operation, size: int) -> Iterator[Rows]:
    whole = operation.delta or operation.packing
    shape = operation.source.shape
    count, columns = shape if whole and len(shape) == 2 else (operation.elements, 1)
    step = max(1, size // max(1, columns))
    for first in range(0, count, step):
        yield Rows(operation, first, min(first + step, count), columns)


def _file(name: str, operations: list[Operation], base: Path | None) -> FilePlan:
    header = _read_header(base) if base else b""
    if base and _unmoved(operations, base):
        kept = tuple(replace(op, start=op.source.start) for op in operations)
        return FilePlan(name, header, base.stat().st_size, kept, base)
    metadata = json.loads(header[8:]).get("__metadata__") if header else None
    new, starts, size = _new_header(operations, metadata or {"format": "pt"})
    moved = tuple(replace(op, start=start) for op, start in zip(operations, starts, strict=True))
    return FilePlan(name, new, size, moved, None)


def _unmoved(operations: list[Operation], base: Path) -> bool:
    """Whether the tensors are the file's own, all of them, in its order, none packed or cast."""
    kept = all(op.file == base and op.packing is None and op.dtype == op.source.dtype for op in operations)
    return kept and [op.source for op in operations] == read_header(base)


def _read_header(path: Path) -> bytes:
    with path.open("rb") as file:
        length = file.read(8)
        return length + file.read(struct.unpack("<Q", length)[0])


def _new_header(operations: list[Operation], metadata: Mapping[str, str]) -> tuple[bytes, list[int], int]:
    """The header, where each tensor starts, and the file's size. Tensors stand without gaps, as the format demands."""
    entries: dict[str, object] = {"__metadata__": metadata}
    starts, end = [], 0
    for operation in operations:
        start, end = end, end + operation.size
        starts.append(start)
        entries[operation.source.name] = {
            "dtype": operation.dtype,
            "shape": list(operation.source.shape),
            "data_offsets": [start, end],
        }
    text = json.dumps(entries, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    offset = 8 + len(text)
    return struct.pack("<Q", len(text)) + text, [offset + start for start in starts], offset + end
