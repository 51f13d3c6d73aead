"""A stream that tells how far it was read: the progress of an upload, whatever the store."""

from __future__ import annotations

from typing import BinaryIO

from adapterhub.registry.base import Progress


class Counted:
    """Reads from ``source``; tells every byte once, also when it is read again from its start."""

    def __init__(self, source: BinaryIO, progress: Progress | None) -> None:
        self._source = source
        self._progress = progress
        self._at = 0
        self._told = 0

    def read(self, size: int = -1, /) -> bytes:
        data = self._source.read(size)
        self._at += len(data)
        self.tell_until(self._at)
        return data

    def seekable(self) -> bool:
        return self._source.seekable()

    def seek(self, offset: int, whence: int = 0, /) -> int:
        self._at = self._source.seek(offset, whence)
        return self._at

    def tell_until(self, size: int) -> None:
        """Bytes up to ``size`` are done: sent, or found to be there."""
        if self._progress and size > self._told:
            self._progress(size - self._told)
        self._told = max(self._told, size)
