"""Bytes at an offset, read and written whole; and what makes them survive a crash.

Handles are opened per call and seek: no shared position between threads, and no call that only some systems have.
"""

from __future__ import annotations

import os
import sys
from contextlib import suppress
from pathlib import Path
from typing import BinaryIO

from adapterhub.errors import StorageError

_FICLONE = 0x40049409  # ioctl of linux/fs.h


def read_at(path: Path, offset: int, length: int) -> bytearray:
    """Raises StorageError where the file has become shorter than it was."""
    raw = bytearray(length)
    read_into(path, offset, memoryview(raw))
    return raw


def read_into(path: Path, offset: int, view: memoryview) -> None:
    """Fill ``view`` from a file. Raises StorageError where the file has become shorter than it was."""
    with path.open("rb", buffering=0) as file:
        _read(file, offset, view)


def write_at(path: Path, offset: int, data: memoryview | bytes) -> None:
    """Write into a file that exists."""
    with path.open("r+b", buffering=0) as file:
        _write(file, offset, memoryview(data))


def reflink(source: Path, target: Path) -> bool:
    """Make ``target`` a new file that shares all blocks of ``source``. False where the file system cannot."""
    if sys.platform != "linux":
        return False
    import fcntl

    with source.open("rb") as old, target.open("wb") as new, suppress(OSError):
        fcntl.ioctl(new.fileno(), _FICLONE, old.fileno())
        return True
    return False


def sync(path: Path) -> None:
    """Make a file's bytes, or a folder's names, survive a crash of the machine."""
    if sys.platform == "win32" and path.is_dir():
        return  # folders cannot be opened there
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _read(file: BinaryIO, offset: int, view: memoryview) -> None:
    done = 0
    file.seek(offset)
    while done < len(view):
        count = file.readinto(view[done:])  # type: ignore[attr-defined]
        if not count:
            raise StorageError(f"{file.name} became shorter while it was read", hint="fetch the base model again")
        done += count


def _write(file: BinaryIO, offset: int, data: memoryview) -> None:
    done = 0
    file.seek(offset)
    while done < len(data):
        done += file.write(data[done:])
