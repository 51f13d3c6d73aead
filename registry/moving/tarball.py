"""Plain tar files, written the same each time and read without trust.

Only regular files, one after another, with short names. Whatever else tar knows (links, folders, devices, sparse files,
long names and extended headers, whose sizes a reader would have to believe) is refused; nothing is unpacked by name.
"""

from __future__ import annotations

import io
import tarfile
from collections.abc import Iterator
from contextlib import contextmanager
from typing import BinaryIO

from adapterhub.errors import IntegrityError
from adapterhub.registry.files import copy_hashed

BLOCK = tarfile.BLOCKSIZE  # 512 bytes
LONGEST = 99  # characters of a name: more needs an extended header


def write_member(target: BinaryIO, name: str, source: BinaryIO, *, size: int, sha256: str) -> None:
    """Append a file; no times, no owners. Raises IntegrityError where ``source`` is something else."""
    assert len(name) <= LONGEST, name
    header = tarfile.TarInfo(name)
    header.size = size
    target.write(header.tobuf(format=tarfile.GNU_FORMAT))
    if copy_hashed(source, target) != (size, sha256):
        raise IntegrityError(f"{name} changed while it was packed", hint="type the same command again")
    target.write(bytes(-size % BLOCK))


def write_end(target: BinaryIO) -> None:
    target.write(bytes(2 * BLOCK))


@contextmanager
def member(source: BinaryIO) -> Iterator[tuple[str, int, BinaryIO] | None]:
    """The next file as name, size in bytes, and a stream that ends with it; None at the end.

    Raises IntegrityError for what is no plain tar file, or was cut.
    """
    header = _header(source)
    if header is None:
        yield None
        return
    stream = _Part(source, header.size)
    yield header.name, header.size, stream
    while stream.read(1 << 20):
        pass
    _exactly(source, -header.size % BLOCK)


def _header(source: BinaryIO) -> tarfile.TarInfo | None:
    block = _exactly(source, BLOCK)
    if block == bytes(BLOCK):
        if _exactly(source, BLOCK) != bytes(BLOCK):
            raise _broken("something follows its end")
        return None
    try:
        header = tarfile.TarInfo.frombuf(block, "ascii", "strict")
    except (tarfile.TarError, ValueError) as error:
        raise _broken(str(error)) from error
    if header.type not in (tarfile.REGTYPE, tarfile.AREGTYPE) or header.size < 0 or header.linkname:
        raise _broken(f"{header.name[:100]!a} is no plain file")
    return header


def _exactly(source: BinaryIO, size: int) -> bytes:
    found = source.read(size)
    if len(found) != size:
        raise _broken("it ends too early")
    return found


def _broken(why: str) -> IntegrityError:
    return IntegrityError("the bundle cannot be read", why=why, hint="copy it again, or make it again with `ah bundle`")


class _Part(io.RawIOBase, BinaryIO):
    """The next ``size`` bytes of a stream, as a stream."""

    def __init__(self, source: BinaryIO, size: int) -> None:
        self._source = source
        self._left = size

    def read(self, size: int = -1) -> bytes:
        wanted = self._left if size < 0 else min(size, self._left)
        found = _exactly(self._source, wanted)
        self._left -= wanted
        return found
