"""What codes and scales stand for, and whether each code is the nearest to its weight. numpy, no torch.

Every weight is looked at, not a sample: where the change that an adapter makes is smaller than a step of four bits,
only the codes of many weights together show that it was made.

* |code - weight / scale| is at most half a step between codes, and what rounding the weight to the model's dtype before
  may move it; a weight beyond the largest code has that code
* a scale is at most what the largest weight under it needs, and at least half of that
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import numpy.typing as npt

from adapterhub.export.schemes import Scheme
from adapterhub.export.unpack import float8_values, round_to

Array = npt.NDArray[Any]

BOUND = "of every weight, half a step between the codes around it, times its scale"  # what the certificate says
_SLACK = 2.0**-6  # of a scale: it is rounded to as few as 8 bits
_FLOAT8_LARGEST = 448.0
_DIVIDING = 1 + 2.0**-12  # what a division in float32 may add to half a step, and more


@dataclass(frozen=True)
class Fit:
    """Sums over some rows: how far dequantised weights lie from those of the model without quantisation."""

    lost: float  # ‖dequantised − rounded‖²
    whole: float  # ‖rounded‖²
    elements: int
    clipped: int  # weights beyond the largest code
    worst: float  # largest distance between a code and its weight, as a share of what is allowed: 1 would be the limit
    scales: bool  # whether all are such as their weights need

    def __add__(self, other: Fit) -> Fit:
        return replace(
            self,
            lost=self.lost + other.lost,
            whole=self.whole + other.whole,
            elements=self.elements + other.elements,
            clipped=self.clipped + other.clipped,
            worst=max(self.worst, other.worst),
            scales=self.scales and other.scales,
        )

    @property
    def right(self) -> bool:
        return self.scales and self.worst <= 1

    @property
    def error(self) -> float:
        """Relative, in the Frobenius norm."""
        return float(np.sqrt(self.lost / self.whole)) if self.whole else 0.0


def fit(scheme: Scheme, raw: Array, scales: Array, *, truth: Array, rounding: Array, dtype: str) -> Fit:
    """Compare rows with what they should be.

    ``raw`` (rows, bytes of one) and ``scales`` (rows, groups) are what was stored. ``truth`` (rows, columns) are the
    weights in float64, ``rounding`` how far each may have been moved before, and ``dtype`` what they were rounded to.
    """
    codes = unpack_codes(scheme, raw, truth.shape[1])
    shape = (truth.shape[0], scheme.groups(truth.shape[1]), -1)
    spread, wide = scales.astype(np.float64).reshape(*shape[:2], 1), truth.reshape(shape)
    exact = wide / spread
    low, high = (-_FLOAT8_LARGEST, _FLOAT8_LARGEST) if scheme.kind == "float" else _range(scheme.bits)
    found = codes.reshape(shape)
    beyond = ((found == high) & (exact > high)) | ((found == low) & (exact < low))
    half = _float8_step(np.maximum(np.abs(exact), np.abs(found))) / 2 if scheme.kind == "float" else 0.5
    share = np.where(beyond, 0.0, np.abs(found - exact) / (half * _DIVIDING + rounding.reshape(shape) / spread))
    rounded = round_to(truth.astype("<f4"), dtype).astype(np.float64)
    lost = (found * spread).reshape(truth.shape) - rounded
    return Fit(
        lost=float((lost**2).sum()),
        whole=float((rounded**2).sum()),
        elements=truth.size,
        clipped=int(beyond.sum()),
        worst=float(np.nan_to_num(share, nan=np.inf).max(initial=0.0)),
        scales=_needed(spread, wide, high, dtype),
    )


def unpack_codes(scheme: Scheme, raw: Array, columns: int) -> Array:
    """The codes as numbers, float64 (rows, columns), of bytes (rows, bytes of one)."""
    if scheme.kind == "float":
        values: Array = float8_values("F8_E4M3")[raw].astype(np.float64)
        return values
    if not scheme.packed:
        return raw.view(np.int8).astype(np.float64)
    if scheme.bits == 4:
        raw = np.stack([raw & 0x0F, raw >> 4], axis=-1).reshape(len(raw), -1)
    codes: Array = raw[:, :columns].astype(np.float64) - 2 ** (scheme.bits - 1)
    return codes


def _range(bits: int) -> tuple[int, int]:
    return -(2 ** (bits - 1)), 2 ** (bits - 1) - 1


def _float8_step(values: Array) -> Array:
    """Between neighbours of E4M3 around positive values: three binary digits, the least exponent -6."""
    exponents = np.clip(np.frexp(values)[1] - 1, -6, 8)
    steps: Array = np.ldexp(1.0, exponents - 3)
    return steps


def _needed(scales: Array, wide: Array, high: float, dtype: str) -> bool:
    needed = np.abs(wide).max(axis=-1, keepdims=True) / high
    tiniest = 2.0**-14 if dtype == "F16" else 2.0**-126  # the smallest normal value, which rows of zeros have
    fits = (scales <= needed * (1 + _SLACK) + tiniest) & (scales >= needed * (0.5 - _SLACK))
    return bool(fits.all())
