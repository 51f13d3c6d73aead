"""One file of a version, from wherever its bytes are: written and checked, or only checked.

A fetch that was killed left the start of the file. The next one hashes that start, asks for the rest, and only where
the whole is wrong begins again from nothing: a machine that crashed may have kept something else than was written.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from pathlib import Path
from typing import BinaryIO

from adapterhub.errors import IntegrityError, NotFound
from adapterhub.manifest import FileEntry, Record
from adapterhub.registry.base import Progress
from adapterhub.registry.files import lasting, storage_errors

Source = Callable[[int], BinaryIO]  # opens the bytes from an offset on; raises NotFound, StorageError

_CHUNK = 1 << 20  # bytes
_LARGE_CHUNK = 8 << 20  # where many files are hashed at once: each step waits for its turn in the interpreter


def file_of(record: Record, path: str) -> FileEntry:
    """Raises NotFound."""
    for entry in record.manifest.files:
        if entry.path == path:
            return entry
    raise NotFound(f"{record.ref} has no file {path!a}", hint=f"ah show {record.ref}")


def fetch(
    source: Source, entry: FileEntry, destination: Path, *, record: Record, progress: Progress | None = None
) -> None:
    """As `base.Registry.fetch_file`."""
    kept = destination.stat().st_size if destination.is_file() else 0
    try:
        if kept and _write(source, entry, destination, record, progress):
            return
        if kept:
            _start_over(destination, record)
        if not _write(source, entry, destination, record, progress):
            raise _wrong(entry, record)
    except (IntegrityError, NotFound):
        destination.unlink(missing_ok=True)
        raise


def check(source: Source, entry: FileEntry, *, record: Record) -> None:
    """Raises IntegrityError, NotFound, StorageError."""
    with source(0) as stream:
        seen = _Seen(entry)
        while chunk := stream.read(_LARGE_CHUNK):
            seen.add(chunk)
            if seen.size > entry.size:
                break
    if not seen.is_right:
        raise _wrong(entry, record)


class _Seen:
    """How much of a file went by, and its hash."""

    def __init__(self, entry: FileEntry) -> None:
        self._entry = entry
        self._hash = hashlib.sha256()
        self.size = 0

    def add(self, chunk: bytes) -> None:
        self._hash.update(chunk)
        self.size += len(chunk)

    @property
    def is_right(self) -> bool:
        return (self.size, self._hash.hexdigest()) == (self._entry.size, self._entry.sha256)


def _write(source: Source, entry: FileEntry, destination: Path, record: Record, progress: Progress | None) -> bool:
    """Append to ``destination`` what it lacks; whether it is the right file then, on disk."""
    seen = _Seen(entry)
    what = _cannot(destination, record)
    with storage_errors(what), destination.open("a+b") as target, lasting(target) as written:
        target.seek(0)
        while chunk := target.read(_CHUNK):
            _count(seen, chunk, progress)
        if seen.size < entry.size:
            with source(seen.size) as stream:
                # never more than was published: a store that gives other bytes must not fill the disk
                while seen.size <= entry.size and (chunk := stream.read(_CHUNK)):
                    target.write(chunk)
                    written(len(chunk))
                    _count(seen, chunk, progress)
    return seen.is_right


def _count(seen: _Seen, chunk: bytes, progress: Progress | None) -> None:
    seen.add(chunk)
    if progress:
        progress(len(chunk))


def _start_over(destination: Path, record: Record) -> None:
    with storage_errors(_cannot(destination, record)):
        destination.unlink()


def _cannot(destination: Path, record: Record) -> str:
    return f"a file of {record.ref} cannot be copied to {destination}"


def _wrong(entry: FileEntry, record: Record) -> IntegrityError:
    return IntegrityError(
        f"{entry.path} of {record.ref} is not what was published",
        why=f"the registry's bytes have another size or sha256 than {entry.size} and {entry.sha256[:12]}…",
        hint=f"ah fsck {record.name}",
    )
