"""The Store on a folder: one file a key, made whole by a hard link.

    <root>/tmp/<id>      being written
    <root>/<key>         the key: linked from there when the bytes are on disk

`os.link` fails where the name exists, on every POSIX file system and on NTFS, which makes it create-if-absent. What a
killed process leaves in ``tmp/`` is no key and never becomes one.
"""

from __future__ import annotations

import errno
import os
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from heapq import heapify, heappop, heappush
from itertools import islice
from pathlib import Path
from typing import BinaryIO

from adapterhub.errors import AdapterError, AlreadyExists, IntegrityError, NotFound, UnsafeStore
from adapterhub.registry.files import copy_hashed, folder_to_disk, hashed, make_folders, storage_errors, to_disk
from adapterhub.registry.store import Entry, check_key, check_size


class LocalStore:
    """Keys as files below ``root``, which is made by the first `create`."""

    def __init__(self, root: Path) -> None:
        self.root = root.expanduser().absolute()
        self._lasting: set[Path] = set()  # folders whose own entry is known to be on disk

    @property
    def url(self) -> str:
        return self.root.as_uri()

    def create(self, key: str, value: bytes, *, lasting: bool = True) -> None:
        path = self._path(key)
        with self._errors("written"), self._unfinished() as (unfinished, file):
            file.write(value)
            to_disk(file) if lasting else file.flush()
            self._link(unfinished, path)
            if lasting:
                self._folders_to_disk(path.parent)

    def create_file(self, key: str, source: BinaryIO, *, size: int, sha256: str) -> None:
        path = self._path(key)
        if self.exists(key):
            self._check_stored(key, sha256)
            with self._errors("written"):
                self._folders_to_disk(path.parent)  # who stored it may have come only this far
            return
        with self._errors("written"), self._unfinished() as (unfinished, file):
            found = copy_hashed(source, file)
            if found != (size, sha256):
                raise AdapterError(
                    f"{key} was not stored: its bytes are others than announced",
                    why=f"{found[0]} bytes with sha256 {found[1][:12]}…, not {size} with {sha256[:12]}…",
                )
            to_disk(file)
            with suppress(AlreadyExists):  # somebody stored the same bytes meanwhile
                self._link(unfinished, path)
            self._folders_to_disk(path.parent)

    def read(self, key: str) -> bytes:
        with self._reading(key) as path:
            check_size(key, path.stat().st_size)
            return path.read_bytes()

    def open(self, key: str, *, offset: int = 0) -> BinaryIO:
        with self._reading(key) as path:
            file = path.open("rb")
            file.seek(offset)
            return file

    def exists(self, key: str) -> bool:
        with self._errors("read"):
            return self._path(key).is_file()

    def keys(self, prefix: str, *, after: str = "", limit: int | None = None) -> list[str]:
        with self._errors("read"):
            return list(self._walk(prefix, after) if limit is None else islice(self._first(prefix, after), limit))

    def entries(self, prefix: str) -> Iterator[Entry]:
        with self._errors("read"):
            for key in self._walk(prefix, ""):
                with suppress(FileNotFoundError):  # deleted meanwhile
                    found = (self.root / key).stat()
                    yield Entry(key, found.st_size, found.st_mtime)

    def folders(self, prefix: str) -> list[str]:
        with self._errors("read"):
            return sorted(entry.name for entry in self._entries(prefix) if entry.is_dir())

    def delete(self, *keys: str) -> None:
        with self._errors("written"):
            for key in keys:
                self._path(key).unlink(missing_ok=True)

    def clear(self, prefix: str) -> None:
        self.delete(*self.keys(prefix))
        with self._errors("written"):
            for folder, _, _ in os.walk(self._path(prefix.removesuffix("/")), topdown=False):
                with suppress(OSError):  # somebody writes there all the same: not empty, or gone already
                    Path(folder).rmdir()

    def sweep(self, *, older_than: float, dry_run: bool = False) -> int:
        horizon, swept = time.time() - older_than, 0
        with self._errors("written"):
            for entry in self._entries("tmp/"):
                with suppress(FileNotFoundError):  # its writer is done, or another sweeper was first
                    if entry.stat().st_mtime < horizon:
                        swept += 1
                        if not dry_run:
                            Path(entry).unlink()
        return swept

    def _check_stored(self, key: str, sha256: str) -> None:
        """A blob that was damaged since it was stored would make a version that nobody can fetch."""
        with self.open(key) as source, self._errors("read"):
            _, found = hashed(source)
        if found != sha256:
            raise IntegrityError(
                f"the registry's copy of {key} is damaged",
                why=f"it has the sha256 {found[:12]}…",
                hint=f"restore {self.root / key} from a copy, or remove it and publish the adapter again",
            )

    def _path(self, key: str) -> Path:
        check_key(key)
        return self.root / key

    @contextmanager
    def _unfinished(self) -> Iterator[tuple[Path, BinaryIO]]:
        """A new file that is gone at the end, whatever happens but a crash."""
        folder = self.root / "tmp"
        make_folders(folder)
        path = folder / uuid.uuid4().hex
        try:
            with path.open("xb") as file:
                yield path, file
        finally:
            path.unlink(missing_ok=True)

    def _link(self, unfinished: Path, path: Path) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            os.link(unfinished, path)
        except FileExistsError as error:
            raise AlreadyExists(f"{path} exists") from error
        except OSError as error:
            if error.errno in {errno.EPERM, errno.EOPNOTSUPP, errno.ENOSYS, errno.EMLINK}:
                raise UnsafeStore(
                    f"{self.root} cannot hold a registry",
                    why=f"its file system makes no hard links ({error.strerror}), so two publishers could collide",
                    hint="name a folder on another file system with --registry",
                ) from error
            raise

    def _folders_to_disk(self, folder: Path) -> None:
        """The new entry lasts, and so do the folders above it, whoever made them."""
        folder_to_disk(folder)
        while folder != self.root and folder not in self._lasting:
            folder_to_disk(folder.parent)
            self._lasting.add(folder)
            folder = folder.parent

    def _walk(self, prefix: str, after: str) -> Iterator[str]:
        """Keys in order: a folder sorts with its ``/``, because ``a-b/x`` comes before ``a/x``."""
        for name in sorted(entry.name + "/" if entry.is_dir() else entry.name for entry in self._entries(prefix)):
            key = prefix + name
            if key.endswith("/"):
                if key > after or after.startswith(key):
                    yield from self._walk(key, after)
            elif key > after:
                yield key

    def _first(self, prefix: str, after: str) -> Iterator[str]:
        """The same for who wants a few: "the newest" of 100,000 versions needs no sorted list of them.

        Nor is each asked whether it is a folder: one that is goes back with its ``/``, and comes again in its place.
        """
        names = self._names(prefix)
        if after:
            names = [name for name in names if _may_follow(f"{prefix}{name}/", after)]
        heapify(names)
        while names:
            key = prefix + (name := heappop(names))
            if name.endswith("/"):
                yield from self._first(key, after)
            elif (self.root / key).is_dir():
                heappush(names, name + "/")
            elif key > after:
                yield key

    def _entries(self, prefix: str) -> list[os.DirEntry[str]]:
        check_key(prefix.removesuffix("/"))
        try:
            with os.scandir(self.root / prefix) as found:
                return list(found)
        except (FileNotFoundError, NotADirectoryError):
            return []

    def _names(self, prefix: str) -> list[str]:
        check_key(prefix.removesuffix("/"))
        try:
            return os.listdir(self.root / prefix)  # noqa: PTH208 - the names alone, and there may be many
        except (FileNotFoundError, NotADirectoryError):
            return []

    @contextmanager
    def _reading(self, key: str) -> Iterator[Path]:
        with self._errors("read"):
            try:
                yield self._path(key)
            except (FileNotFoundError, NotADirectoryError, IsADirectoryError) as error:
                raise NotFound(f"{key} is not in {self.root}") from error

    @contextmanager
    def _errors(self, done: str) -> Iterator[None]:
        with storage_errors(f"the registry folder {self.root} cannot be {done}"):
            yield


def _may_follow(folder: str, after: str) -> bool:
    """Whether something in this folder, or a file of its name, can come after a key."""
    return folder > after or after.startswith(folder)
