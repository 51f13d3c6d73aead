"""Files that last: copied and hashed in one pass, and on disk when the call returns."""

from __future__ import annotations

import errno
import hashlib
import os
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

from adapterhub.errors import StorageError

_CHUNK = 1 << 20  # bytes
_MUCH = 32 << 20  # bytes

_NEXT = {
    errno.ENOSPC: "free some space, then type the same command again",
    errno.EDQUOT: "free some space, then type the same command again",
    errno.EFBIG: "raise the limit on file sizes (ulimit -f), then type the same command again",
    errno.EACCES: "ask its owner for write access, or name another place",
    errno.EPERM: "ask its owner for write access, or name another place",
    errno.EROFS: "name a place that can be written",
    errno.ENOTDIR: "a file stands where a folder should be: name another place",
    errno.EEXIST: "a file stands where a folder should be: name another place",
}


@contextmanager
def storage_errors(what: str) -> Iterator[None]:
    """Turns what the operating system says into a StorageError: ``what`` could not be done, why, what to type."""
    try:
        yield
    except OSError as error:
        raise StorageError(what, why=error.strerror or str(error), hint=_NEXT.get(error.errno or 0, "")) from error


def copy_hashed(source: BinaryIO, target: BinaryIO) -> tuple[int, str]:
    """Copy a stream to its end; returns bytes copied and their sha256 (hex)."""
    digest, size = hashlib.sha256(), 0
    while chunk := source.read(_CHUNK):
        digest.update(chunk)
        target.write(chunk)
        size += len(chunk)
    return size, digest.hexdigest()


def hashed(source: BinaryIO) -> tuple[int, str]:
    """Read a stream to its end; returns its bytes and their sha256 (hex)."""
    digest, size = hashlib.sha256(), 0
    while chunk := source.read(_CHUNK):
        digest.update(chunk)
        size += len(chunk)
    return size, digest.hexdigest()


def to_disk(file: BinaryIO) -> None:
    """What was written survives a crash of the machine."""
    file.flush()
    os.fsync(file.fileno())


@contextmanager
def lasting(file: BinaryIO) -> Iterator[Callable[[int], None]]:
    """At the end of the block all of a file is on disk; to be told of the bytes that were written.

    Much is brought there while more is written: the kernel alone begins seconds later, and all the waiting would be at
    the end.
    """
    waiting = 0  # bytes
    running: Future[None] | None = None
    with ThreadPoolExecutor(1, thread_name_prefix="ah-to-disk") as pool:

        def written(size: int) -> None:
            nonlocal waiting, running
            waiting += size
            if waiting < _MUCH or (running is not None and not running.done()):
                return
            if running is not None:
                running.result()
            file.flush()
            running, waiting = pool.submit(os.fsync, file.fileno()), 0

        yield written
        if running is not None:
            running.result()
    to_disk(file)


def make_folders(folder: Path) -> None:
    """Like ``mkdir -p``, and what was made survives a crash of the machine."""
    if folder.is_dir():
        return
    make_folders(folder.parent)
    folder.mkdir(exist_ok=True)
    folder_to_disk(folder.parent)


def folder_to_disk(folder: Path) -> None:
    """The folder's entries survive a crash of the machine."""
    if os.name == "nt":  # folders cannot be opened there; NTFS journals their entries itself
        return
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
