"""A file put together from pieces holds what was put there, whatever the pieces, the threads and what was there."""

from __future__ import annotations

import errno
import itertools
import os
import random
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from adapterhub.export import output
from adapterhub.export.output import InPlace, Output

CHUNK = 2**16
SIZE = 2 * CHUNK + 12_346


@pytest.fixture(autouse=True)
def small_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(output, "CHUNK", CHUNK)


def pieces(rng: random.Random, start: int = 0) -> list[tuple[int, int]]:
    """(offset, length) of all bytes from ``start`` on, in order."""
    cuts = sorted({start, SIZE, *(rng.randrange(start, SIZE) for _ in range(20))})
    return [(first, last - first) for first, last in itertools.pairwise(cuts)]


@pytest.fixture(params=["direct", "cached", "refused"])
def kind(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """The ways to the disk: past the page cache, through it, and where a file system opens files so and writes none."""
    kind: str = request.param
    if kind == "cached":
        monkeypatch.delattr(os, "O_DIRECT", raising=False)
    if kind == "refused":

        def refuse(*_: object) -> int:
            raise OSError(errno.EINVAL, "Invalid argument")

        monkeypatch.setattr(output.os, "pwrite", refuse)
    return kind


@pytest.mark.parametrize("seed", range(2))
def test_pieces_from_many_threads_make_the_file(kind: str, tmp_path: Path, seed: int) -> None:
    rng, file = random.Random(seed), tmp_path / "x"
    content = rng.randbytes(SIZE)
    made = Output(file, SIZE)
    with ThreadPoolExecutor(5) as pool:
        list(pool.map(lambda at: made.write(at[0], content[at[0] : at[0] + at[1]]), pieces(rng)))
    made.close()
    assert file.read_bytes() == content


@pytest.mark.parametrize("after", [1, CHUNK - 1, CHUNK, CHUNK + 777, SIZE])
def test_it_goes_on_after_what_is_there_and_leaves_that(kind: str, tmp_path: Path, after: int) -> None:
    rng, file = random.Random(after), tmp_path / "x"
    content = rng.randbytes(SIZE)
    file.write_bytes(content[:after] + bytes(SIZE - after))
    made = Output(file, SIZE, after=after)
    for offset, length in pieces(rng):
        wrong = bytes(length) if offset + length <= after else content[offset : offset + length]
        made.write(offset, wrong)  # what lies before is not written again, whatever somebody says of it
    made.close()
    assert file.read_bytes() == content


def test_whole_is_told_no_sooner_than_it_is_so(tmp_path: Path) -> None:
    file = tmp_path / "x"
    made = Output(file, SIZE)
    made.write(CHUNK, b"b" * CHUNK)  # the second chunk
    assert made.whole == 0
    made.write(0, b"a" * (CHUNK - 1))
    assert made.whole == 0
    made.write(CHUNK - 1, b"a")
    made.close()
    assert made.whole == 2 * CHUNK
    assert file.read_bytes()[: 2 * CHUNK] == b"a" * CHUNK + b"b" * CHUNK


def test_a_full_disk_is_told_to_all_who_write(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> int:
        raise OSError(errno.ENOSPC, "No space left on device")

    made = Output(tmp_path / "x", 40 * CHUNK)
    monkeypatch.setattr(output.os, "pwrite", full)
    told = 0
    for number in range(20):
        try:
            made.write(number * CHUNK, bytes(CHUNK))
        except OSError as error:
            told += error.errno == errno.ENOSPC
    assert told >= 14  # the first few are on their way when the first fails
    with pytest.raises(OSError, match="No space left"):
        made.close()


def test_a_clone_is_written_in_place(tmp_path: Path) -> None:
    file = tmp_path / "x"
    file.write_bytes(b"abcdef")
    made = InPlace(file, 6)
    with made.room(2, 2) as [(begin, view)]:
        view[:] = b"XY"
    assert begin == 0
    made.write(5, b"Z")
    made.close()
    assert file.read_bytes() == b"abXYeZ"
