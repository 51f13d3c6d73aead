"""Batches of usage on this machine's disk, from the moment they are taken until the database has them.

    <folder>/<writer>.jsonl      one batch a line, in the order of their numbers; locked while its server lives

A batch is here before it is sent, so neither a database that is away nor a killed server loses it. What a server left
behind is taken up by the next one that starts (`left_behind`).
"""

from __future__ import annotations

import contextlib
import fcntl
import logging
import os
from collections.abc import Iterator
from pathlib import Path
from types import TracebackType
from typing import BinaryIO, Self

from adapterhub.errors import Conflict, StorageError
from adapterhub.registry.files import make_folders, storage_errors, to_disk
from adapterhub.serving.usage import Batch

log = logging.getLogger(__name__)


class Spool:
    """The file of one writer, and what of it the database does not have. Not for threads."""

    def __init__(self, path: Path) -> None:
        """Made where it is not there. Raises StorageError, Conflict where another process has it."""
        self._path = path
        with storage_errors(f"{path} cannot be written"):
            make_folders(path.parent)
            self._file: BinaryIO = path.open("a+b", buffering=0)
            try:
                fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError as error:
                self._file.close()
                raise Conflict(f"{path} is in use", why="its server lives") from error
            self._file.seek(0)
            self.waiting = list(_batches(self._file.read(), path))

    def append(self, batch: Batch) -> None:
        """On disk when it returns. Raises StorageError: then it waits in memory alone, and the file is as it was."""
        self.waiting.append(batch)
        line = batch.to_json().encode() + b"\n"
        with storage_errors(f"{self._path} cannot be written"):
            end = os.fstat(self._file.fileno()).st_size
            try:
                if self._file.write(line) != len(line):
                    raise OSError("only a part of it was written")
                to_disk(self._file)
            except OSError:
                with contextlib.suppress(OSError):
                    os.ftruncate(self._file.fileno(), end)  # no half line in front of the next one
                raise

    def booked(self, count: int) -> None:
        """The database has the first ``count`` that waited. What stays in the file then is passed over there."""
        del self.waiting[:count]
        if not self.waiting:
            with contextlib.suppress(OSError):
                os.ftruncate(self._file.fileno(), 0)

    def close(self) -> None:
        """The file goes where nothing waits in it."""
        if not self.waiting:
            with contextlib.suppress(OSError):
                self._path.unlink()
        self._file.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def left_behind(folder: Path, *, own: Path) -> Iterator[Spool]:
    """The spools of servers that are gone, each of them ours until the next. ``own`` is passed over."""
    for path in sorted(folder.glob("*.jsonl")):
        if path == own:
            continue
        try:
            spool = Spool(path)
        except (Conflict, StorageError) as error:
            log.debug("not taken up: %s", error)
            continue
        with spool:
            yield spool


def _batches(text: bytes, path: Path) -> Iterator[Batch]:
    for line in text.splitlines():
        try:
            yield Batch.from_json(line.decode())
        except ValueError:  # its server was killed while it wrote: it is the flush that may be lost
            log.warning("%s holds a broken line, which is passed over", path)
