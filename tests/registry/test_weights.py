from __future__ import annotations

import hashlib
import math
import struct
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.numpy import save_file

from adapterhub import peftdir
from adapterhub.errors import AdapterError
from adapterhub.registry import weights
from adapterhub.registry.weights import scan


def scanned(path: Path) -> weights.Scan:
    return scan(path, peftdir.read_header(path))


def bfloat16(values: Any) -> bytes:
    return (np.asarray(values, dtype="<f4").view("<u4") >> 16).astype("<u2").tobytes()


def write_raw(path: Path, dtype: str, data: bytes, width: int) -> None:
    header = f'{{"x": {{"dtype": "{dtype}", "shape": [{len(data) // width}], "data_offsets": [0, {len(data)}]}}}}'
    path.write_bytes(struct.pack("<Q", len(header)) + header.encode() + data)


def test_one_pass_hashes_and_judges(tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    rng = np.random.default_rng(0)
    large = rng.normal(size=weights._READ).astype(np.float32)  # several chunks
    save_file({"a": large, "b": np.zeros((3, 5), dtype=np.float16), "c": -np.zeros(4, dtype=np.float32)}, path)
    found = scanned(path)
    assert found.sha256 == hashlib.sha256(path.read_bytes()).hexdigest()
    assert found.size == path.stat().st_size
    assert found.not_finite is None
    assert found.zero == {"b", "c"}


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("place", [0, 7, -1])
@pytest.mark.parametrize("dtype", ["float16", "float32", "float64", "BF16"])
def test_one_bad_number_is_found_anywhere(tmp_path: Path, bad: float, place: int, dtype: str) -> None:
    values = np.linspace(-1e4, 1e4, 1000)
    values[place] = bad
    path = tmp_path / "x.safetensors"
    if dtype == "BF16":
        write_raw(path, "BF16", bfloat16(values), 2)
    else:
        save_file({"x": values.astype(dtype)}, path)
    assert scanned(path).not_finite == "x"


@settings(max_examples=200, deadline=None)
@given(st.integers(0, 0xFFFF), st.sampled_from(["BF16", "F16", "F8_E5M2", "F8_E4M3", "I8"]))
def test_every_bit_pattern_is_judged_as_its_dtype_means(bits: int, dtype: str) -> None:
    wide = dtype in {"BF16", "F16"}
    data = struct.pack("<H", bits) if wide else bytes([bits & 0xFF])
    finite, any_set = weights._judge(data * 3, dtype)
    value = meaning(bits if wide else bits & 0xFF, dtype)
    assert finite == math.isfinite(value)
    assert any_set == (value != 0)


def meaning(bits: int, dtype: str) -> float:
    """The number, by the definition of its format."""
    if dtype == "BF16":
        return float(struct.unpack("<f", struct.pack("<I", bits << 16))[0])
    if dtype == "F16":
        return float(struct.unpack("<e", struct.pack("<H", bits))[0])
    if dtype == "F8_E5M2":  # the upper half of a float16
        return float(struct.unpack("<e", struct.pack("<H", bits << 8))[0])
    if dtype == "I8":
        return float(bits)
    exponent, mantissa = bits >> 3 & 0xF, bits & 7  # E4M3 has no infinity, and one NaN a sign (arXiv:2209.05433)
    if exponent == 0xF and mantissa == 7:
        return math.nan
    return mantissa / 8 * 2.0**-6 if exponent == 0 else (1 + mantissa / 8) * 2.0 ** (exponent - 7)


def test_a_file_that_shrinks_while_it_is_read_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    save_file({"x": np.ones(1000, dtype=np.float32)}, path)
    tensors = peftdir.read_header(path)
    path.write_bytes(path.read_bytes()[:-10])
    with pytest.raises(AdapterError, match="truncated"):
        scan(path, tensors)
