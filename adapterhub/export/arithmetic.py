"""The sum itself: float32 W + scale · B·A, rounded once.

Every block is widened to float32, whatever dtype the base and the factors have, added to, and rounded once (to nearest,
ties to even). A product that is rounded to bfloat16 before it is added puts 5 % of the weights one step off. DoRA's
lengths are told in float64 from the float32 sum, and given to it before it is rounded.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from adapterhub.errors import Unsupported
from adapterhub.export.files import read_at
from adapterhub.export.layout import BLOCK, WIDTH, Delta, Operation, Rows, Tokens
from adapterhub.export.unpack import read_rows
from adapterhub.peftdir import Factor, Tensor


@dataclass(frozen=True)
class Product:
    """A delta ready to add, in float32: ΔW = scale · left @ right, left (rows, rank), right (rank, columns).

    Of a stack of experts left has the rows of all of them, and right is (experts, rank, columns).
    """

    left: Any  # torch.Tensor
    right: Any  # torch.Tensor
    scale: float
    lengths: Any = None  # DoRA: the length that each row of the sum gets, (rows,)
    gains: Any = None  # DoRA on a transposed weight: what each column of the sum is multiplied by, (columns,)

    def right_of(self, rows: Rows) -> Any:
        """(rank, columns) for a block, which lies in one expert."""
        if self.right.dim() == 2:
            return self.right
        return self.right[rows.first * len(self.right) // len(self.left)]


class Factors:
    """Reads the factors in an adapter's weight file. Those of stacked experts stay until others come: in a checkpoint
    with a tensor an expert, each takes its share of them."""

    _KEPT = 2  # of one layer: gate and up, and down

    def __init__(self, weights: Path) -> None:
        self._weights = weights
        self._stacks: dict[str, tuple[Any, Any]] = {}

    def product(self, operation: Operation, delta: Delta) -> Product:
        """Where DoRA's lengths are the columns', this reads the operation's whole tensor once, in blocks."""
        import torch

        factor = delta.factor
        if delta.bias and factor.bias:
            return Product(self._read(factor.bias)[:, None], torch.ones(1, 1), factor.scale)
        if delta.share:
            a, b = self._stack(factor, delta.share.experts)
            return Product(
                b[delta.share.expert, delta.share.first : delta.share.last], a[delta.share.expert], factor.scale
            )
        if delta.experts > 1:
            a, b = self._stack(factor, delta.experts)
            left, right = (a.mT, b.mT) if delta.transposed else (b, a)
            return Product(left.flatten(0, 1), right.contiguous(), factor.scale)
        a, b = self._read(factor.a), self._read(factor.b)
        left, right = (a.T.contiguous(), b.T.contiguous()) if delta.transposed else (b, a)
        plain = Product(left, right, factor.scale)
        if delta.magnitude is None:
            return plain
        lengths = self._read(delta.magnitude)
        if not delta.transposed:
            return replace(plain, lengths=lengths)
        return replace(plain, gains=_gains(lengths.double(), _column_norms(operation, plain), operation))

    def _stack(self, factor: Factor, experts: int) -> tuple[Any, Any]:
        """A (experts, rank, in) and B (experts, out, rank)."""
        if factor.a.name not in self._stacks:
            while len(self._stacks) >= self._KEPT:
                del self._stacks[next(iter(self._stacks))]
            a, b = self._read(factor.a), self._read(factor.b)
            by_expert = b.view(len(b), -1, experts).permute(2, 0, 1).contiguous()
            self._stacks[factor.a.name] = a.view(experts, -1, a.shape[1]), by_expert
        return self._stacks[factor.a.name]

    def _read(self, tensor: Tensor) -> Any:
        return read_float32(tensor, self._weights)


def product(operation: Operation, delta: Delta, weights: Path) -> Product:
    """One delta, from factors that no other tensor needs."""
    return Factors(weights).product(operation, delta)


def _column_norms(operation: Operation, delta: Product) -> Any:
    """‖V‖ of each column of V = W + s·B·A, in float64: (columns,)."""
    import torch

    count, columns = operation.source.shape
    squares = torch.zeros(columns, dtype=torch.float64)
    step = max(1, BLOCK // columns)
    for first in range(0, count, step):
        block = _sum(Rows(operation, first, min(first + step, count), columns), delta)
        squares += torch.linalg.vector_norm(block, dim=0, dtype=torch.float64) ** 2
    return squares.sqrt()


def _gains(lengths: Any, norms: Any, operation: Operation) -> Any:
    """What rows or columns of these norms must be multiplied by to have these lengths."""
    if not bool((norms > 0).all()):
        raise Unsupported(
            f"{operation.source.name} cannot be merged",
            why="DoRA gives a length to a row that is zero, and so has no direction",
            hint="serve it as an adapter",
        )
    return (lengths / norms).float()


def _sum(rows: Rows, delta: Product | None) -> Any:
    """W + ΔW of a block in float32, (rows, columns), in this thread's buffers."""
    import torch

    raw, dtype = read_rows(rows, lambda size: memoryview(_room("raw", size).numpy()))
    old = torch.frombuffer(raw, dtype=torch_dtype(dtype), count=rows.elements)
    block = _room("wide", 4 * rows.elements).view(torch.float32).copy_(old).view(-1, rows.columns)
    if rows.operation.tokens:
        _set_tokens(block, rows, rows.operation.tokens)
    if delta is not None:
        block.addmm_(delta.left[rows.first : rows.last], delta.right_of(rows), alpha=delta.scale)
    return block


def _set_tokens(block: Any, rows: Rows, tokens: Tokens) -> None:
    chosen = tokens.within(rows.first, rows.last)
    if chosen:
        values = read_float32(tokens.values, tokens.file)
        for at, i in chosen:
            block[at] = values[i]


def values(rows: Rows, delta: Product | None) -> Any:
    """The new values of a block, float32, (elements,). They lie in this thread's buffers, until its next block."""
    import torch

    block = _sum(rows, delta)
    if delta is not None and delta.lengths is not None:
        norms = torch.linalg.vector_norm(block, dim=1, dtype=torch.float64)
        block *= _gains(delta.lengths[rows.first : rows.last].double(), norms, rows.operation)[:, None]
    if delta is not None and delta.gains is not None:
        block *= delta.gains
    return block.view(-1)


def store(values: Any, operation: Operation, *, begin: int, into: memoryview) -> None:
    """Round values once, to the operation's dtype, and fill ``into``, which begins at that byte of theirs.

    Raises Unsupported where float16 cannot hold a value.
    """
    import torch

    new = torch.frombuffer(into, dtype=torch_dtype(operation.dtype))
    first = begin // new.itemsize
    wide = values[first : first + len(new)]
    new.copy_(wide)
    if new.dtype == torch.float16 and bool(new.isinf().any()) and not bool(wide.isinf().any()):
        raise Unsupported(
            f"{operation.source.name} does not fit float16",
            why=f"it holds {float(wide.abs().max()):.3g}, float16 ends at 65504",
            hint="export with --dtype bfloat16 or float32",
        )


def rewrite(rows: Rows, delta: Product | None) -> memoryview:
    """The new bytes of a block, in this thread's buffers like `values`. Raises as `store`."""
    width = WIDTH[rows.operation.dtype]
    new = memoryview(_room("narrow", width * rows.elements).numpy()).cast("B")
    store(values(rows, delta), rows.operation, begin=0, into=new)
    return new


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
    return torch.frombuffer(raw, dtype=torch_dtype(tensor.dtype)).view(tensor.shape).to(torch.float32)


def torch_dtype(name: str) -> Any:
    """torch's, of safetensors' name."""
    import torch

    return {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}[name]
