"""The proof beside the model: `export.json`, and what it says was checked.

The check shares no arithmetic with the merge: it reads the base, the adapter and the result again with numpy.

* every byte of what the plan keeps is the base's, and every header is the planned one
* of every merged tensor, sampled rows are the float64 sum W + s·B·A rounded once. Allowed beyond half a step of the
  output dtype is what a float32 sum of r products may lose, γ(r+4) · (|W| + |s|·|B||A|) with γ(n) = n·2⁻²⁴ (Higham,
  *Accuracy and Stability of Numerical Algorithms*, 3.1): never more, and hardly ever that
* of every merged tensor, ‖W' − W‖ over all elements is ‖s·B·A‖, which the factors give without the product:
  s²·tr((BᵀB)(AAᵀ)); allowed is what the rounding of W' may add
* with DoRA the sampled rows have the magnitudes' lengths, and ‖W'‖ over all elements is ‖m‖
* what is only cast, or the adapter's in place of the base's, is the value there, rounded once
* of every tensor that is quantised, merged or not, all codes are the nearest to the float64 sum (`dequantise`)
"""

from __future__ import annotations

import hashlib
import json
import math
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from adapterhub import peftdir
from adapterhub.errors import IntegrityError, NotFound
from adapterhub.export import dequantise
from adapterhub.export.dequantise import Fit
from adapterhub.export.evidence import Certificate, QuantisedCheck, TensorCheck
from adapterhub.export.exact import Array, Factors, Matrices, exact_factors, read_old
from adapterhub.export.files import read_at
from adapterhub.export.floats import DIGITS, TINIEST, distance, step, widen
from adapterhub.export.layout import WIDTH, Copy, FilePlan, Operation, Rows, blocks
from adapterhub.export.parallel import in_order
from adapterhub.export.plan import Plan

FILE = "export.json"
FORMAT = 1

_ROWS = 8  # sampled of every merged tensor
_UNIT = 2.0**-24  # rounding of one float32 operation
_CACHED = 2**15  # elements of float64 whose many intermediate values the caches hold


def certify(plan: Plan, folder: Path, *, progress: Callable[[int], None] = lambda _: None) -> Certificate:
    """Check the files in ``folder`` against base and adapter. ``progress`` is called with the bytes done so far.

    Raises IntegrityError at the first that is not right.
    """
    checks = []
    quantised: dict[str, _Codes] = {}
    kept_bytes = before = 0
    for file in plan.files:
        _check_header(file, folder / file.name)
        found: dict[str, _Found] = {}
        done = before
        for part in in_order(_jobs(file, folder / file.name, plan.adapter.path / peftdir.WEIGHTS)):
            if isinstance(part, int):
                kept_bytes += part
                done += part
            elif isinstance(part, _Codes):
                done += part.size
                name = part.operation.source.name
                quantised[name] = quantised[name] + part if name in quantised else part
            else:
                name = part.factors.name
                found[name] = found[name] + part if name in found else part
                done += part.elements * WIDTH[part.factors.dtype]
            progress(done)
        before += file.size
        progress(before)
        checks += [part.judge() for part in found.values()]
    fits = [codes.fit for codes in quantised.values()]
    return Certificate(
        merged=tuple(checks),
        quantised=tuple(codes.judge() for codes in quantised.values()),
        error=sum(fits[1:], fits[0]).error if fits else 0.0,
        planned=len(plan.merged),
        cast=sum(op.cast for op in plan.operations),
        kept=sum(op.kept and not op.saved for op in plan.operations),
        kept_bytes=kept_bytes,
        saved=sum(op.saved or op.tokens is not None for op in plan.operations),
    )


def hash_files(folder: Path) -> dict[str, dict[str, Any]]:
    """Name → size and sha256 of every file in the folder but hidden ones and the certificate itself."""
    paths = sorted(p for p in folder.iterdir() if p.is_file() and p.name != FILE and not p.name.startswith("."))
    return dict(in_order(partial(_hash_file, path) for path in paths))


def verify(folder: Path) -> dict[str, Any]:
    """Compare a model's files with its certificate, which is returned.

    Raises:
        NotFound: the folder has no certificate.
        IntegrityError: a file was changed, added or lost since the export.
    """
    try:
        certificate: dict[str, Any] = json.loads((folder / FILE).read_bytes())
        expected: dict[str, Any] = certificate["files"]
    except OSError as error:
        raise NotFound(
            f"{folder} has no certificate", why=f"there is no {FILE} in it", hint="export it again: ah export …"
        ) from error
    except (ValueError, KeyError, TypeError) as error:
        raise IntegrityError(f"{folder / FILE} cannot be read", why=repr(error)) from error
    found = hash_files(folder)
    for name in sorted(expected.keys() | found.keys()):
        if expected.get(name) != found.get(name):
            what = "was changed" if name in expected and name in found else "is missing"
            what = what if name in expected else "is not of this export"
            raise IntegrityError(
                f"{folder / name} {what}", why=f"{FILE} says otherwise", hint="export the model again: ah export …"
            )
    return certificate


# ── one block ────────────────────────────────────────────────────────────────────────────────────────────────


@dataclass(frozen=True)
class _Found:
    """Sums over some blocks of one merged tensor."""

    factors: Factors
    elements: int
    change: float  # ‖W' − W‖²
    old: float  # ‖W‖²
    new: float  # ‖W'‖²
    sampled: int
    not_nearest: int
    worst: float

    def __add__(self, other: _Found) -> _Found:
        return replace(
            self,
            elements=self.elements + other.elements,
            change=self.change + other.change,
            old=self.old + other.old,
            new=self.new + other.new,
            sampled=self.sampled + other.sampled,
            not_nearest=self.not_nearest + other.not_nearest,
            worst=max(self.worst, other.worst),
        )

    def judge(self) -> TensorCheck:
        """Raises IntegrityError where the whole tensor did not change by what the factors say."""
        planned = self.factors.norm
        found = math.sqrt(self.change if self.factors.lengths is None else self.new)
        rounding = 2.0 ** -DIGITS[self.factors.dtype] * math.sqrt(self.new)
        rounding += TINIEST[self.factors.dtype] * math.sqrt(self.elements)
        summing = (self.factors.rank + 4) * _UNIT * (math.sqrt(self.old) + self.factors.bound)
        if not abs(found - planned) <= rounding + summing + 1e-5 * planned:
            raise IntegrityError(
                f"the merged {self.factors.name} is wrong",
                why=f"by the adapter its {self.factors.measured} is {planned:.6g}, it is {found:.6g} (Frobenius norm)",
                hint="export again; if it stays so, check the disk, and report it",
            )
        return TensorCheck(
            tensor=self.factors.name,
            rank=self.factors.rank,
            scale=self.factors.scale,
            norm_planned=planned,
            norm_found=found,
            sampled=self.sampled,
            not_nearest=self.not_nearest,
            worst=self.worst,
        )


@dataclass(frozen=True)
class _Codes:
    """What was found of some rows of a quantised tensor."""

    operation: Operation
    size: int  # bytes
    fit: Fit

    def __add__(self, other: _Codes) -> _Codes:
        return replace(self, size=self.size + other.size, fit=self.fit + other.fit)

    def judge(self) -> QuantisedCheck:
        """Raises IntegrityError where a code is not the nearest, or a scale not what its weights need."""
        name, fit = self.operation.source.name, self.fit
        if not fit.right:
            far = f"a code lies {fit.worst:.3g} times as far from its weight as it may"
            raise IntegrityError(
                f"the quantised {name} is wrong",
                why=far if fit.scales else "a scale is not what its weights need",
                hint="export again; if it stays so, check the disk, and report it",
            )
        return QuantisedCheck(name, self.operation.delta is not None, fit.error, fit.clipped, fit.worst)


def _jobs(file: FilePlan, target: Path, weights: Path) -> Iterator[Callable[[], int | _Found | _Codes]]:
    matrices = Matrices(weights)
    operation: Operation | None = None
    factors: Factors | None = None
    for block in blocks(file):
        if isinstance(block, Copy):
            yield partial(_check_copy, target, block)
            continue
        if block.operation is not operation:
            operation = block.operation
            factors = exact_factors(operation, operation.delta, matrices) if operation.delta else None
        yield partial(_check_codes if block.operation.scheme else _check_rows, target, block, factors)


def _check_header(file: FilePlan, target: Path) -> None:
    if target.stat().st_size != file.size or bytes(read_at(target, 0, len(file.header))) != file.header:
        raise IntegrityError(f"the header of {file.name} is not the planned one", hint="export again")


def _check_copy(target: Path, block: Copy) -> int:
    if read_at(block.file, block.source, block.length) != read_at(target, block.target, block.length):
        raise IntegrityError(
            f"{target.name} differs from the base where nothing should change",
            why=f"within {block.length} bytes from byte {block.target}",
            hint="export again; if it stays so, check the disk",
        )
    return block.length


def _check_rows(target: Path, rows: Rows, factors: Factors | None) -> int | _Found:
    new_dtype = rows.operation.dtype
    old = read_old(rows)
    new = widen(read_at(target, rows.target, rows.elements * WIDTH[new_dtype]), new_dtype)
    if factors is None:
        if not np.array_equal(new, old):  # they are equal where the new dtype holds all values of the old one
            _refuse_far(rows, new, distance(new, old.astype(np.float64), new_dtype), np.zeros(1))
        return 0
    shape = (-1, rows.columns)
    sampled, not_nearest, worst = _check_samples(rows, old.reshape(shape), new.reshape(shape), factors)
    with np.errstate(invalid="ignore", over="ignore"):
        change = new - old
    squares = (_square(change), _square(old), _square(new))
    return _Found(factors, rows.elements, *squares, sampled, not_nearest, worst)


def _check_samples(rows: Rows, old: Array, new: Array, factors: Factors) -> tuple[int, int, float]:
    """Elements compared, how many are not the nearest, and the largest distance as a share of what is allowed."""
    chosen = _sample(rows)
    if not len(chosen):
        return 0, 0, 0.0
    before, after = old[chosen - rows.first].astype(np.float64), new[chosen - rows.first]
    truth, magnitude = _sum(before, chosen, factors)
    steps = distance(after, truth, factors.dtype)
    allowed = (factors.rank + 4) * _UNIT * magnitude / step(truth, factors.dtype)
    _refuse_far(rows, after, steps, allowed)
    return int(after.size), int((steps > 0.5).sum()), float((steps / (0.5 + allowed)).max(initial=0))


def _sum(before: Array, chosen: Array, factors: Factors) -> tuple[Array, Array]:
    """W + s·B·A of chosen rows of a block in float64, and what bounds the error of a float32 one, as a multiple."""
    left, right = factors.left[chosen], factors.right_of(int(chosen[0]))
    truth = before + factors.scale * (left @ right)
    magnitude = np.abs(before) + abs(factors.scale) * (np.abs(left) @ np.abs(right))
    return _lengthened(truth, magnitude, chosen, factors)


def _check_codes(target: Path, rows: Rows, factors: Factors | None) -> _Codes:
    operation, scheme, columns = rows.operation, rows.operation.scheme, rows.columns
    assert scheme is not None
    width, groups = operation.row_size(columns), scheme.groups(columns)
    height = rows.last - rows.first
    raw = np.frombuffer(read_at(target, rows.target, height * width), np.uint8).reshape(height, width)
    stored = read_at(target, rows.scales, height * groups * WIDTH[operation.dtype])
    scales = widen(stored, operation.dtype).reshape(height, groups)
    old = read_old(rows).reshape(height, columns)
    found = None
    for first in range(0, height, max(1, _CACHED // columns)):
        some = slice(first, first + max(1, _CACHED // columns))
        truth, rounding = _unrounded(old[some].astype(np.float64), rows.first + first, operation.dtype, factors)
        part = dequantise.fit(scheme, raw[some], scales[some], truth=truth, rounding=rounding, dtype=operation.dtype)
        found = found + part if found else part
    assert found is not None
    return _Codes(operation, raw.nbytes + len(stored), found)


def _unrounded(old: Array, first: int, dtype: str, factors: Factors | None) -> tuple[Array, Array]:
    """Rows from ``first`` before they are quantised, and how far from that rounding and summing may have moved them."""
    half, tiniest = 2.0 ** -DIGITS[dtype], TINIEST[dtype] / 2
    if factors is None:
        return old, np.abs(old) * half + tiniest
    truth, magnitude = _sum(old, np.arange(first, first + len(old)), factors)
    return truth, np.abs(truth) * half + tiniest + (factors.rank + 4) * _UNIT * magnitude


def _lengthened(truth: Array, magnitude: Array, chosen: Array, factors: Factors) -> tuple[Array, Array]:
    """The sampled rows with DoRA's lengths, and what bounds their error: the gain's own is that of the norm, which a
    float32 sum moves by no more than the norm of its error, and two roundings."""
    if factors.lengths is None:
        return truth, magnitude
    if factors.norms is not None and factors.moved is not None:
        norms, moved, lengths = factors.norms, factors.moved, factors.lengths
    else:
        norms, lengths = np.linalg.norm(truth, axis=1, keepdims=True), factors.lengths[chosen][:, None]
        moved = np.linalg.norm(magnitude, axis=1, keepdims=True) / norms
    gains = lengths / norms
    truth = truth * gains
    return truth, magnitude * np.abs(gains) + np.abs(truth) * (moved + 1)


def _refuse_far(rows: Rows, after: Array, steps: Array, allowed: Array) -> None:
    if after.size and not bool((steps <= 0.5 + allowed).all()):
        raise IntegrityError(
            f"the new {rows.operation.source.name} is wrong",
            why=f"rows {rows.first} to {rows.last} hold a value {float(np.nanmax(steps)):.3g} steps from the right one",
            hint="export again; if it stays so, check the disk, and report it",
        )


def _sample(rows: Rows) -> Array:
    """The sampled rows of the tensor that lie in this block: the first, the last, some that its name chooses, and of a
    stack one of each expert."""
    count = rows.operation.elements // rows.columns
    experts = rows.operation.delta.experts if rows.operation.delta else 1
    seed = zlib.crc32(rows.operation.source.name.encode())
    chance = np.random.default_rng(seed)
    chosen = chance.integers(0, count, _ROWS)
    each = np.arange(experts) * (count // experts) + chance.integers(0, count // experts)
    chosen = np.unique(np.concatenate([chosen[2:], [0, count - 1], each if experts > 1 else each[:0]]))
    return chosen[(chosen >= rows.first) & (chosen < rows.last)]


def _square(values: Array) -> float:
    """‖values‖²; a base that holds NaN or infinity keeps them, and they do not count."""
    finite = values if np.isfinite(values).all() else np.nan_to_num(values, posinf=0, neginf=0)
    return float(np.dot(finite.ravel(), finite.ravel()))


def _hash_file(path: Path) -> tuple[str, dict[str, Any]]:
    with path.open("rb") as file:
        sha256 = hashlib.file_digest(file, "sha256").hexdigest()
        return path.name, {"size": file.tell(), "sha256": sha256}
