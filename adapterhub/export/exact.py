"""The sum in float64, by numpy, for the certificate: it shares no arithmetic with the merge. No torch."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from adapterhub.export.files import read_at
from adapterhub.export.floats import widen
from adapterhub.export.layout import BLOCK, Delta, Operation, Rows
from adapterhub.export.unpack import read_rows
from adapterhub.peftdir import Tensor

Array = npt.NDArray[Any]


@dataclass(frozen=True)
class Factors:
    """One tensor's factors in float64, and what follows from them."""

    name: str
    dtype: str
    rank: int
    scale: float
    left: Array  # (rows, rank)
    right: Array  # (experts, rank, columns), 1 of them where the tensor is no stack; left has the rows of all
    lengths: Array | None = None  # DoRA's magnitudes: of rows, (rows,), or of columns, (columns,)
    norms: Array | None = None  # of the sum's columns, where the lengths are theirs
    moved: Array | None = None  # bound of the error of such a norm, as a multiple of that of its elements' own

    @property
    def norm(self) -> float:
        """‖s·B·A‖ by the Gram matrices of the factors; ‖m‖ of DoRA."""
        if self.lengths is not None:
            return float(np.linalg.norm(self.lengths))
        left = self.left.reshape(len(self.right), -1, self.left.shape[1])
        gram = (left.mT @ left) * (self.right @ self.right.mT).mT
        return abs(self.scale) * math.sqrt(max(0.0, float(gram.sum())))

    def right_of(self, row: int) -> Array:
        """(rank, columns) for a row of the tensor, and for all rows of its block, which lies in one expert."""
        found: Array = self.right[row * len(self.right) // len(self.left)]
        return found

    @property
    def measured(self) -> str:
        return "difference from the base" if self.lengths is None else "size"

    @property
    def bound(self) -> float:
        """|s|·‖B‖·‖A‖: at least the norm of |s|·|B||A|."""
        return abs(self.scale) * float(np.linalg.norm(self.left) * np.linalg.norm(self.right))


class Matrices:
    """The adapter's tensors. Those that hold all experts stay until others come: each expert takes its share."""

    _KEPT = 4  # of one layer: A and B of gate and up, and of down

    def __init__(self, weights: Path) -> None:
        self._weights = weights
        self._stacks: dict[str, Array] = {}

    def read(self, tensor: Tensor) -> Array:
        return _matrix(tensor, self._weights)

    def stack(self, tensor: Tensor) -> Array:
        if tensor.name not in self._stacks:
            while len(self._stacks) >= self._KEPT:
                del self._stacks[next(iter(self._stacks))]
            self._stacks[tensor.name] = _matrix(tensor, self._weights)
        return self._stacks[tensor.name]


def exact_factors(operation: Operation, delta: Delta, matrices: Matrices) -> Factors:
    factor, name = delta.factor, operation.source.name
    if delta.bias and factor.bias:
        bias = matrices.read(factor.bias)[:, None]
        return Factors(name, operation.dtype, 1, factor.scale, bias, np.ones((1, 1, 1)))
    read = matrices.stack if delta.share else matrices.read
    a, b = _by_expert(delta, read(factor.a), read(factor.b))
    left, right = (a.mT, b.mT) if delta.transposed else (b, a)
    left = left.reshape(-1, factor.rank)
    plain = Factors(name, operation.dtype, factor.rank, factor.scale, left, right)
    if delta.magnitude is None:
        return plain
    lengths = matrices.read(delta.magnitude)
    if not delta.transposed:
        return replace(plain, lengths=lengths)
    norms, moved = _column_norms(operation, plain)
    return replace(plain, lengths=lengths, norms=norms, moved=moved)


def _by_expert(delta: Delta, a: Array, b: Array) -> tuple[Array, Array]:
    """A (experts, rank, in) and B (experts, out, rank) of the experts whose matrices the tensor holds."""
    experts = delta.share.experts if delta.share else delta.experts
    a, b = a.reshape(experts, -1, a.shape[1]), np.moveaxis(b.reshape(len(b), -1, experts), 2, 0)
    if delta.share is None:
        return a, b
    one = slice(delta.share.expert, delta.share.expert + 1)
    return a[one], b[one, delta.share.first : delta.share.last]


def _column_norms(operation: Operation, factors: Factors) -> tuple[Array, Array]:
    """‖V‖ of each column of V = W + s·B·A, in float64, and ‖|W| + |s|·|B||A|‖ over it; reads the tensor in blocks."""
    count, columns = operation.source.shape
    squares, bounds = np.zeros(columns), np.zeros(columns)
    height = max(1, BLOCK // columns)
    for first in range(0, count, height):
        rows = Rows(operation, first, min(first + height, count), columns)
        old = read_old(rows).reshape(-1, columns).astype(np.float64)
        left, right = factors.left[first : rows.last], factors.right_of(first)
        squares += ((old + factors.scale * (left @ right)) ** 2).sum(axis=0)
        bounds += ((np.abs(old) + abs(factors.scale) * (np.abs(left) @ np.abs(right))) ** 2).sum(axis=0)
    return np.sqrt(squares), np.sqrt(bounds / squares)


def _matrix(tensor: Tensor, weights: Path) -> Array:
    raw = read_at(weights, tensor.start, tensor.end - tensor.start)
    return widen(raw, tensor.dtype).reshape(tensor.shape).astype(np.float64)


def read_old(rows: Rows) -> Array:
    """The base's values, or the adapter's where it has rows of its own, before anything is added."""
    old, tokens = widen(*read_rows(rows)), rows.operation.tokens
    chosen = tokens.within(rows.first, rows.last) if tokens else []
    if not tokens or not chosen:
        return old
    old, values = old.copy(), _matrix(tokens.values, tokens.file)
    for at, i in chosen:
        old.reshape(-1, rows.columns)[at] = values[i]
    return old
