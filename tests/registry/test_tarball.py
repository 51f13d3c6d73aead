"""Plain tar: what was written is read, whatever its size, and what is anything else is refused."""

from __future__ import annotations

import hashlib
import io
import tarfile

import pytest
from hypothesis import given
from hypothesis import strategies as st

from adapterhub.errors import IntegrityError
from adapterhub.registry.moving.tarball import member, write_end, write_member


def packed(files: dict[str, bytes]) -> bytes:
    target = io.BytesIO()
    for name, data in files.items():
        write_member(target, name, io.BytesIO(data), size=len(data), sha256=hashlib.sha256(data).hexdigest())
    write_end(target)
    return target.getvalue()


def unpacked(data: bytes) -> dict[str, bytes]:
    source, files = io.BytesIO(data), {}
    while True:
        with member(source) as found:
            if found is None:
                return files
            files[found[0]] = found[2].read()


@given(
    st.dictionaries(st.from_regex(r"[a-z0-9/._-]{0,98}[a-z0-9]", fullmatch=True), st.binary(max_size=2000), max_size=5)
)
def test_what_is_written_is_read(files: dict[str, bytes]) -> None:
    data = packed(files)
    assert unpacked(data) == files
    assert packed(files) == data
    with tarfile.open(fileobj=io.BytesIO(data)) as tar:
        assert {m.name: tar.extractfile(m).read() for m in tar} == files  # type: ignore[union-attr]


@given(st.binary(max_size=4000))
def test_any_bytes_are_a_tarball_or_refused(data: bytes) -> None:
    try:
        unpacked(data)
    except IntegrityError:
        return


@given(st.data())
def test_a_tarball_with_a_changed_byte_is_read_or_refused(data: st.DataObject) -> None:
    whole = bytearray(packed({"a": b"1" * 600, "b/c": b"2"}))
    whole[data.draw(st.integers(0, len(whole) - 1))] ^= data.draw(st.integers(1, 255))
    try:
        unpacked(bytes(whole))
    except IntegrityError:
        return


def test_a_member_may_be_larger_than_8_gib() -> None:
    header = tarfile.TarInfo("model.safetensors")
    header.size = 9 * 2**30
    source = io.BytesIO(header.tobuf(format=tarfile.GNU_FORMAT))
    with pytest.raises(IntegrityError, match="too early"), member(source) as found:
        assert found is not None
        assert found[1] == 9 * 2**30


def test_a_file_that_changes_meanwhile_is_refused() -> None:
    with pytest.raises(IntegrityError, match="changed"):
        write_member(io.BytesIO(), "a", io.BytesIO(b"new"), size=3, sha256=hashlib.sha256(b"old").hexdigest())
