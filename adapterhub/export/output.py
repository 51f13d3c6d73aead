"""A weight file on its way to the disk: put together in chunks, each written when its last byte has come.

Chunks go past the page cache where the file system lets us (O_DIRECT). The kernel then need not clear, fill and write
pages that nobody reads again, which takes longer than the merge itself; nor does a model larger than memory push
everything else out of it.
"""

from __future__ import annotations

import errno
import mmap
import os
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from adapterhub.export.files import read_into, write_at

CHUNK = 4 * 2**20  # bytes; a multiple of every disk's block
_WRITERS = 2  # one chunk is on its way to the disk while the next is handed over
_BLOCK = 4096  # bytes: what goes past the page cache begins and ends at multiples of it
Part = tuple[int, memoryview]  # where it begins in the range that was asked for, and the bytes to fill


@dataclass
class _Chunk:
    memory: mmap.mmap  # begins at a page, as O_DIRECT wants it
    missing: int  # bytes


class Output:
    """One file, filled by several threads, each byte once, in about the file's order: memory is a few chunks."""

    def __init__(self, path: Path, size: int, *, after: int = 0) -> None:
        """The first ``after`` bytes are there already. Otherwise the file is made anew."""
        self._path = path
        self._size = size
        self._after = after
        self._lock = threading.Lock()
        self._open: dict[int, _Chunk] = {}
        self._spare: list[mmap.mmap] = []
        self._next = after // CHUNK  # no chunk from here on was ever begun, but those that are open or written
        self._written: set[int] = set()  # of those after the first that is not
        self._places = threading.BoundedSemaphore(2 * _WRITERS)
        self._writers = ThreadPoolExecutor(_WRITERS, "write")
        self._failed: list[OSError] = []
        if not after:
            with path.open("wb") as new:
                new.truncate(size)
        self._descriptor = _opened(path)
        if after % CHUNK and after < size:
            at = after // CHUNK * CHUNK
            chunk = self._chunk(after // CHUNK)
            read_into(path, at, memoryview(chunk.memory)[: after - at])
            chunk.missing -= after - at

    @property
    def whole(self) -> int:
        """Every byte before this one was handed to the disk."""
        with self._lock:
            return max(self._after, min(self._next * CHUNK, self._size))

    def write(self, offset: int, data: memoryview | bytes) -> None:
        with self.room(offset, len(data)) as parts:
            for begin, view in parts:
                view[:] = data[begin : begin + len(view)]

    @contextmanager
    def room(self, offset: int, length: int) -> Iterator[list[Part]]:
        """The bytes from ``offset`` on, to be filled: in parts where chunks meet, without those that are there already.

        They count as filled when the context ends. Raises OSError where the disk takes no more.
        """
        first = max(offset, self._after)
        numbers = range(first // CHUNK, -(-(offset + length) // CHUNK)) if first < offset + length else range(0)
        spans = [(n, max(first, n * CHUNK), min(offset + length, (n + 1) * CHUNK)) for n in numbers]
        with self._lock:
            chunks = [self._chunk(number) for number in numbers]
        yield [
            (start - offset, memoryview(chunk.memory)[start - n * CHUNK : end - n * CHUNK])
            for chunk, (n, start, end) in zip(chunks, spans, strict=True)
        ]
        for chunk, (number, start, end) in zip(chunks, spans, strict=True):
            with self._lock:
                chunk.missing -= end - start
                complete = not chunk.missing
            if complete:
                self._hand_over(number, chunk)

    def close(self) -> None:
        """Chunks that are not complete are forgotten: they are part of nothing that `whole` told."""
        self._writers.shutdown()
        os.close(self._descriptor)
        if self._failed:
            raise self._failed[0]
        with self._path.open("r+b") as file:
            file.truncate(self._size)  # the last chunk was filled up to a multiple of the disk's block

    def _chunk(self, number: int) -> _Chunk:
        if number not in self._open:
            memory = self._spare.pop() if self._spare else mmap.mmap(-1, CHUNK)
            self._open[number] = _Chunk(memory, min(CHUNK, self._size - number * CHUNK))
        return self._open[number]

    def _hand_over(self, number: int, chunk: _Chunk) -> None:
        """To a writer; waits where the disk is behind."""
        self._places.acquire()
        if self._failed:
            self._places.release()
            raise self._failed[0]
        self._writers.submit(self._flush, number, chunk)

    def _flush(self, number: int, chunk: _Chunk) -> None:
        try:
            self._put(number, chunk)
        except OSError as error:  # raised by the next that hands a chunk over, and by `close`
            self._failed.append(error)
        finally:
            self._places.release()

    def _put(self, number: int, chunk: _Chunk) -> None:
        length = min(CHUNK, self._size - number * CHUNK)
        padded = -(-length // _BLOCK) * _BLOCK
        view = memoryview(chunk.memory)[:padded]
        done = 0
        while done < padded:
            done += self._pwrite(view[done:], number * CHUNK + done)
        with self._lock:
            del self._open[number]
            self._spare.append(chunk.memory)
            self._written.add(number)
            while self._next in self._written:
                self._written.remove(self._next)
                self._next += 1

    def _pwrite(self, view: memoryview, at: int) -> int:
        try:
            return os.pwrite(self._descriptor, view, at)
        except OSError as error:
            if error.errno != errno.EINVAL:
                raise
        write_at(self._path, at, view)  # a file system that opens such files, and then does not write them
        return len(view)


class InPlace:
    """A clone: some of its ranges are written anew, through the page cache; the rest it shares."""

    def __init__(self, path: Path, size: int) -> None:
        self._path = path
        self.whole = size  # what is written is handed over at once

    def write(self, offset: int, data: memoryview | bytes) -> None:
        write_at(self._path, offset, data)

    @contextmanager
    def room(self, offset: int, length: int) -> Iterator[list[Part]]:
        data = memoryview(bytearray(length))
        yield [(0, data)]
        write_at(self._path, offset, data)

    def close(self) -> None:
        return


def _opened(path: Path) -> int:
    """For writing, past the page cache if it can be."""
    direct = getattr(os, "O_DIRECT", 0)  # Linux has it
    try:
        return os.open(path, os.O_WRONLY | direct)
    except OSError as error:
        if error.errno != errno.EINVAL or not direct:
            raise
    return os.open(path, os.O_WRONLY)
