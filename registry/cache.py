"""Verified local copies of versions.

    <root>/sha256/<hex>/     one folder a manifest digest: whole, or not there
    <root>/tmp/<id>          being fetched

A version is fetched beside and moved in by one rename, after every byte was checked. Several processes may fetch the
same version at once: one rename wins, all get the same folder. What is deleted under our feet is fetched again.
"""

from __future__ import annotations

import shutil
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from adapterhub.errors import AlreadyExists
from adapterhub.manifest import FileEntry, Record
from adapterhub.registry.base import Registry
from adapterhub.registry.files import folder_to_disk, make_folders, storage_errors


class Cache:
    """Copies below ``root``, which is made by the first `fetch`."""

    def __init__(self, root: Path, registry: Registry) -> None:
        self.root = root.expanduser().absolute()
        self._registry = registry

    def path(self, record: Record) -> Path:
        """Where a version's folder is, or will be."""
        return self.root / "sha256" / record.digest.removeprefix("sha256:")

    def is_present(self, record: Record) -> bool:
        """Whether all files are there in their full size: some `stat` calls, no reading."""
        return not self._missing(record)

    def fetch(self, record: Record) -> Path:
        """The folder of a version; fetches what is missing.

        Raises:
            IntegrityError: the registry gave wrong bytes; nothing of them reached the folder.
            NotFound: the registry has lost the bytes.
            StorageError: the registry is away, or the cache's disk full or not writable.
        """
        folder = self.path(record)
        while missing := self._missing(record):
            if folder.is_dir():
                for entry in missing:
                    self._mend(record, entry)
                continue
            with storage_errors(f"the cache {self.root} cannot be written"):
                make_folders(folder.parent)
                make_folders(self.root / "tmp")
            try:
                fetch_folder(self._registry, record, folder, beside=self.root / "tmp")
            except AlreadyExists:
                continue  # another fetcher was first
        return folder

    def _missing(self, record: Record) -> list[FileEntry]:
        folder = self.path(record)
        return [entry for entry in record.manifest.files if not _has_size(folder / entry.path, entry.size)]

    def _mend(self, record: Record, entry: FileEntry) -> None:
        """Put one lost file back in place: the others may be in use, so the folder is never moved away."""
        with self._unfinished() as unfinished:
            self._registry.fetch_file(record, entry.path, unfinished)
            path = self.path(record) / entry.path
            with storage_errors(f"{path} cannot be written"):
                path.parent.mkdir(parents=True, exist_ok=True)
                unfinished.replace(path)

    @contextmanager
    def _unfinished(self) -> Iterator[Path]:
        with storage_errors(f"the cache {self.root} cannot be written"):
            make_folders(self.root / "tmp")
        path = self.root / "tmp" / uuid.uuid4().hex
        try:
            yield path
        finally:
            path.unlink(missing_ok=True)


def fetch_folder(registry: Registry, record: Record, folder: Path, *, beside: Path | None = None) -> None:
    """All files of a version in a new folder: whole, or not there. Made ``beside`` it, on the same file system.

    Raises:
        AlreadyExists: the folder is there and not empty.
        IntegrityError, NotFound, StorageError: as `Cache.fetch`.
    """
    what = f"{folder} cannot be written"
    unfinished = (beside or folder.parent) / f".{folder.name}.{uuid.uuid4().hex}"
    try:
        with storage_errors(what):
            make_folders(unfinished)
        for entry in record.manifest.files:
            path = unfinished / entry.path
            with storage_errors(what):
                make_folders(path.parent)
            registry.fetch_file(record, entry.path, path)
        with storage_errors(what):
            folder_to_disk(unfinished)
            _move_in(unfinished, folder)
            folder_to_disk(folder.parent)
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)


def _move_in(unfinished: Path, folder: Path) -> None:
    try:
        unfinished.rename(folder)
    except OSError as error:
        if folder.exists():
            raise AlreadyExists(
                f"{folder} is there already", why="nothing is overwritten", hint="name a new folder"
            ) from error
        raise


def _has_size(path: Path, size: int) -> bool:
    try:
        return path.stat().st_size == size
    except OSError:
        return False
