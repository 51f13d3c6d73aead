"""How the weight files of the new model are laid out: what happens to each tensor, and where it goes. No torch.

Where all of a file's tensors keep their dtype and place, the new file has the header and the offsets of the base's,
byte for byte, so that everything between the merged tensors can be cloned. Else (`--dtype`, `--max-shard-size`,
`--quantize`, a quantised base, a tensor more) a new header is made first and the tensors follow it without gaps. Either
way every size is known before the first byte is written.

A tensor that is quantised becomes two or three in the new file. Its blocks write codes and scales at once; their order
and their ends are those of the codes, wherever the scales lie.
"""

from __future__ import annotations

import json
import math
import re
import struct
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from adapterhub.export.packing import Packing
from adapterhub.export.schemes import Part, Scheme
from adapterhub.peftdir import Factor, Tensor, read_header

DTYPES = {"float32": "F32", "float16": "F16", "bfloat16": "BF16"}  # what can be merged and written
WIDTH = {"F32": 4, "F16": 2, "BF16": 2}  # bytes
BLOCK = 2**19  # elements read, computed and written at once: 1 to 2 MiB, which the caches hold


@dataclass(frozen=True)
class Share:
    """What the tensor of one expert takes of factors that hold all experts.

    A is expert by expert, (experts · rank, in); B is rank by rank, (out, rank · experts).
    """

    expert: int
    experts: int
    first: int  # rows of B: a checkpoint may keep gate and up apart where the adapter has them in one
    last: int  # exclusive


@dataclass(frozen=True)
class Delta:
    """What is added to a tensor: scale · B·A, or its transpose where the layer keeps its weight as (in, out).

    Of a factor with a magnitude (DoRA) the sum's rows, or its columns where it is transposed, then get that length.
    """

    factor: Factor
    transposed: bool = False
    bias: bool = False  # what is added is scale · B's bias, to the layer's bias
    experts: int = 1  # whose matrices lie one behind another in the tensor: (experts, rows, columns)
    share: Share | None = None  # where each expert has a tensor of its own

    @property
    def magnitude(self) -> Tensor | None:
        return None if self.bias else self.factor.magnitude


@dataclass(frozen=True)
class Tokens:
    """Rows of an embedding or a head that are the adapter's, in place of the base's."""

    rows: tuple[int, ...]
    values: Tensor  # (len(rows), columns)
    file: Path  # that holds them

    def within(self, first: int, last: int) -> list[tuple[int, int]]:
        """Of those from ``first`` to ``last`` (exclusive): how far behind ``first`` each lies, and its row in
        ``values``."""
        return [(row - first, i) for i, row in enumerate(self.rows) if first <= row < last]


@dataclass(frozen=True)
class Operation:
    """What happens to one tensor: kept as it is, cast, unpacked, or merged (and cast); then it may be quantised."""

    source: Tensor  # its name in the new model and its shape; where its bytes lie, and their dtype
    file: Path  # that holds them
    home: str  # name of the new file
    dtype: str  # in the new file, safetensors' name; of a quantised tensor its scales'
    start: int = 0  # in the new file, bytes from its start; of a quantised tensor its codes'
    delta: Delta | None = None
    packing: Packing | None = None  # of a quantised tensor
    saved: bool = False  # the source is the adapter's, in place of the base's
    tokens: Tokens | None = None  # rows of it that are the adapter's; they are set before anything is added
    scheme: Scheme | None = None  # how it is quantised
    scales: int = 0  # where its scales start in the new file

    @property
    def kept(self) -> bool:
        untouched = not (self.delta or self.packing or self.tokens or self.scheme)
        return untouched and self.dtype == self.source.dtype

    @property
    def cast(self) -> bool:
        """Whether its dtype changes and nothing else."""
        return not (self.kept or self.delta or self.saved or self.tokens or self.scheme)

    @property
    def elements(self) -> int:
        return math.prod(self.source.shape)

    @property
    def parts(self) -> tuple[Part, ...]:
        """What it becomes in the new file; first the weight, or its codes, and then their scales."""
        name, shape = self.source.name, self.source.shape
        if self.scheme:
            return self.scheme.parts(name, shape, self.dtype, WIDTH[self.dtype])
        size = self.source.end - self.source.start if self.kept else self.elements * WIDTH[self.dtype]
        return (Part(name, self.dtype, shape, size),)

    @property
    def size(self) -> int:
        """Bytes in the new file."""
        return sum(part.size for part in self.parts)

    def row_size(self, columns: int) -> int:
        """Bytes of one row in the new file, without its scales."""
        return self.scheme.row_size(columns) if self.scheme else columns * WIDTH[self.dtype]


@dataclass(frozen=True)
class FilePlan:
    """One weight file of the new model."""

    name: str
    header: bytes  # length and JSON, and right behind them the tensors that the plan knows
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
    """Rows ``first`` to ``last`` of a tensor that is merged, unpacked, quantised or cast; a cast one counts as one
    column."""

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
        return self.operation.start + self.first * self.operation.row_size(self.columns)

    @property
    def end(self) -> int:
        """Offset behind it in the new file."""
        return self.target + (self.last - self.first) * self.operation.row_size(self.columns)

    @property
    def scales(self) -> int:
        """Where the scales of a quantised tensor's rows go in the new file."""
        groups = self.operation.scheme.groups(self.columns) if self.operation.scheme else 0
        return self.operation.scales + self.first * groups * WIDTH[self.operation.dtype]

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
    """No block reaches from one expert into the next."""
    whole = operation.delta or operation.packing or operation.tokens or operation.scheme
    shape = operation.source.shape
    columns = shape[-1] if whole and len(shape) > 1 else 1
    count = operation.elements // max(1, columns)
    height = count // operation.delta.experts if operation.delta else count
    step = max(1, size // max(1, columns))
    for top in range(0, count, max(1, height)):
        for first in range(top, top + height, step):
            yield Rows(operation, first, min(first + step, top + height), columns)


def _file(name: str, operations: list[Operation], base: Path | None) -> FilePlan:
    header = _read_header(base) if base else b""
    if base and _unmoved(operations, base):
        kept = tuple(replace(op, start=op.source.start) for op in operations)
        return FilePlan(name, header, base.stat().st_size, kept, base)
    metadata = json.loads(header[8:]).get("__metadata__") if header else None
    new, starts, size = _new_header(_parts(operations), metadata or {"format": "pt"})
    moved = [_moved(operation, starts) for operation in operations]
    return FilePlan(name, new, size, tuple(sorted(moved, key=lambda op: op.start)), None)


def _unmoved(operations: list[Operation], base: Path) -> bool:
    """Whether the tensors are the file's own, all of them, in its order, none packed, cast or quantised."""
    kept = all(
        op.file == base and op.packing is None and op.scheme is None and op.dtype == op.source.dtype
        for op in operations
    )
    return kept and [op.source for op in operations] == read_header(base)


def _read_header(path: Path) -> bytes:
    with path.open("rb") as file:
        length = file.read(8)
        return length + file.read(struct.unpack("<Q", length)[0])


def _parts(operations: list[Operation]) -> list[Part]:
    """In the order of the operations; where some are quantised, what the plan knows first, and then the widest first:
    readers take a tensor where it lies, and want it to start at a multiple of its width."""
    parts = [part for operation in operations for part in operation.parts]
    if not any(operation.scheme for operation in operations):
        return parts
    return sorted(parts, key=lambda part: (not part.constant, -_bits(part.dtype)))


def _bits(dtype: str) -> int:
    """Of one value: ``BF16`` has 16, ``F8_E4M3`` 8, ``BOOL`` a byte."""
    found = re.search(r"\d+", dtype)
    return int(found[0]) if found else 8


def _moved(operation: Operation, starts: Mapping[str, int]) -> Operation:
    parts = operation.parts
    scales = starts[parts[1].name] if operation.scheme else 0
    return replace(operation, start=starts[parts[0].name], scales=scales)


def _new_header(parts: list[Part], metadata: Mapping[str, str]) -> tuple[bytes, dict[str, int], int]:
    """The header with the constants, where each tensor starts, and the file's size. Tensors stand without gaps, as the
    format demands."""
    entries: dict[str, object] = {"__metadata__": metadata}
    starts, end = {}, 0
    for part in parts:
        starts[part.name], end = end, end + part.size
        entries[part.name] = {
            "dtype": part.dtype,
            "shape": list(part.shape),
            "data_offsets": [starts[part.name], end],
        }
    text = json.dumps(entries, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    offset = 8 + len(text)
    constants = b"".join(part.constant for part in parts)
    places = {name: offset + start for name, start in starts.items()}
    return struct.pack("<Q", len(text)) + text + constants, places, offset + end
