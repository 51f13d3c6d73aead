"""One at a time, among the threads and processes of a machine: whoever dies lets go of what it held."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import BinaryIO

from adapterhub.registry.files import make_folders, storage_errors


@contextmanager
def locked(path: Path) -> Iterator[None]:
    """Wait until nobody else is inside the same block with this ``path``, a file that is there only meanwhile.

    Raises StorageError where the file cannot be made.
    """
    file = _held(path)
    try:
        yield
    finally:
        # removed while it is still held: who waits for it sees that its name is gone, and makes a new one
        with suppress(OSError):
            path.unlink()
        file.close()


def _held(path: Path) -> BinaryIO:
    while True:
        with storage_errors(f"{path} cannot be locked"):
            make_folders(path.parent)
            file = path.open("ab")
            try:
                _lock(file)
                if _is_still(file, path):
                    return file
            except BaseException:  # also Ctrl-C: raised again
                file.close()
                raise
            file.close()


def _is_still(file: BinaryIO, path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(file.fileno()), path.stat())
    except FileNotFoundError:
        return False


if sys.platform == "win32":
    import msvcrt
    import time

    def _lock(file: BinaryIO) -> None:
        while True:
            with suppress(OSError):  # msvcrt gives up after ten tries
                return msvcrt.locking(file.fileno(), msvcrt.LK_LOCK, 1)
            time.sleep(0.1)
else:
    import fcntl

    def _lock(file: BinaryIO) -> None:
        fcntl.flock(file, fcntl.LOCK_EX)
