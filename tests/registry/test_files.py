"""Files that are on disk when the call returns."""

from __future__ import annotations

import errno
import os
from pathlib import Path

import pytest

from adapterhub.errors import StorageError
from adapterhub.registry import files
from adapterhub.registry.files import lasting, storage_errors


def test_what_was_written_is_on_disk_at_the_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sizes = []
    sync = os.fsync

    def watched(descriptor: int) -> None:
        sync(descriptor)
        sizes.append(os.fstat(descriptor).st_size)

    monkeypatch.setattr(os, "fsync", watched)
    monkeypatch.setattr(files, "_MUCH", 3000)
    with (tmp_path / "x").open("wb") as file, lasting(file) as written:
        for _ in range(10):
            file.write(bytes(1000))
            written(1000)
    assert 2 <= len(sizes) <= 4
    assert sizes[0] >= 3000
    assert sizes[-1] == 10_000


def test_a_disk_that_fails_meanwhile_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def failing(descriptor: int) -> None:
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(files, "_MUCH", 1)
    with (
        pytest.raises(StorageError, match="x cannot be written"),
        storage_errors("x cannot be written"),
        (tmp_path / "x").open("wb") as file,
        lasting(file) as written,
        monkeypatch.context() as patch,
    ):
        patch.setattr(os, "fsync", failing)
        file.write(b"1")
        written(1)
