"""The numbers of F32, F16 and BF16: their values, and the steps between them. numpy, no torch."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[Any]

DIGITS = {"F32": 24, "F16": 11, "BF16": 8}  # bits of the significand
TINIEST = {"F32": 2.0**-149, "F16": 2.0**-24, "BF16": 2.0**-133}  # the smallest step


def widen(raw: bytes | bytearray | memoryview, dtype: str) -> Array:
    """The values of F32, F16 or BF16 bytes, as float32: exact."""
    if dtype == "BF16":
        return (np.frombuffer(raw, "<u2").astype("<u4") << 16).view("<f4")
    return np.frombuffer(raw, "<f4" if dtype == "F32" else "<f2").astype("<f4", copy=False)


def step(truth: Array, dtype: str) -> Array:
    """The distance between neighbours of ``dtype`` around float64 values: an ulp."""
    exponent = np.frexp(np.where(np.isfinite(truth), truth, 0))[1]
    steps: Array = np.maximum(np.ldexp(1.0, exponent - DIGITS[dtype]), TINIEST[dtype])
    return steps


def distance(found: Array, truth: Array, dtype: str) -> Array:
    """How far values are from the float64 truth, in steps of ``dtype``; 0 where both are the same inf or NaN."""
    with np.errstate(invalid="ignore"):
        away = np.abs(found - truth) / step(truth, dtype)
    return np.where((found == truth) | (np.isnan(found) & np.isnan(truth)), 0.0, away)
