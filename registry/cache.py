"""Verified local copies of versions.

    <root>/sha256/<hex>/     one folder a manifest digest: whole, or not there
    <root>/tmp/<hex>/        being fetched; what a killed fetch left there is where the next one goes on
    <root>/tmp/<hex>.lock    who fetches: the others wait, and find it there

A folder's own time of change is when the version was last asked for: `Cache.trim` goes by it.

A version is fetched beside and moved in by one rename, after every byte was checked. What is deleted or changed under
our feet is fetched again: see `Cache.fetch`.
"""

from __future__ import annotations

import contextlib
import hashlib
import logging
import os
import shutil
import threading
import time
from collections.abc import Collection, Iterator
from pathlib import Path

from adapterhub.errors import AlreadyExists, IntegrityError, NotFound, StorageError
from adapterhub.manifest import FileEntry, Record
from adapterhub.registry.base import Progress, Registry
from adapterhub.registry.files import folder_to_disk, make_folders, storage_errors
from adapterhub.registry.locks import locked
from adapterhub.registry.signing import Signers

log = logging.getLogger(__name__)

Stamp = tuple[int, int, int, int]  # size, inode, times of the last change of content and of anything


class Cache:
    """Copies below ``root``, which is made by the first `fetch`."""

    def __init__(self, root: Path, registry: Registry, *, signers: Signers | None = None) -> None:
        """``signers`` must have signed what is fetched, also what is there already."""
        self.root = root.expanduser().absolute()
        self._registry = registry
        self._signers = signers or Signers()
        self._trimming = threading.Lock()  # two at once would each remove what is too much
        self._verified: dict[Path, Stamp] = {}  # files whose bytes this process has checked

    def path(self, record: Record) -> Path:
        """Where a version's folder is, or will be."""
        return self.root / "sha256" / _hex(record)

    def is_present(self, record: Record) -> bool:
        """Whether all files are there in their full size: some `stat` calls, no reading."""
        folder = self.path(record)
        return all(_size(folder / entry.path) == entry.size for entry in record.manifest.files)

    def fetch(self, record: Record, *, progress: Progress | None = None) -> Path:
        """The folder of a version, its bytes as they were published; fetches what is missing.

        The first time in this process every file is hashed again; after that a `stat` tells whether it was touched.
        What was changed is fetched again, what was added is removed.

        Raises:
            Untrusted: nobody signed it who must have; nothing was fetched.
            IntegrityError: the registry gave wrong bytes; nothing of them reached the folder.
            NotFound: the registry has lost the bytes.
            StorageError: the registry is away, or the cache's disk full or not writable.
        """
        self._signers.require(self._registry, record)
        folder = self.path(record)
        while not self._is_whole(record):
            with locked(self._work(record).with_suffix(".lock")):
                if folder.is_dir():
                    self._mend(record, progress)
                else:
                    _assemble(self._registry, record, folder, work=self._work(record), progress=progress)
                self._stamp(record)
        with contextlib.suppress(OSError):  # a cache that cannot be written is not trimmed either
            os.utime(folder)
        return folder

    def trim(self, limit: int, *, keep: Collection[str] = (), unused_seconds: float = 60.0) -> list[Path]:
        """Remove the versions that were not used for longest, until all take at most ``limit`` bytes.

        What is in ``keep`` (digests) or was asked for within ``unused_seconds`` stays, even over the limit. Returns the
        folders that were removed.
        """
        kept = {digest.removeprefix("sha256:") for digest in keep}
        with self._trimming:
            folders = sorted(_folders(self.root / "sha256"))
            total = sum(size for _, size, _ in folders)
            removed = []
            for used, size, folder in folders:
                if total <= limit or used > time.time() - unused_seconds:
                    break
                if folder.name not in kept:
                    self._remove(folder)
                    removed.append(folder)
                    total -= size
            return removed

    @property
    def size(self) -> int:
        """Of all copies, in bytes."""
        return sum(size for _, size, _ in _folders(self.root / "sha256"))

    def _remove(self, folder: Path) -> None:
        with (
            storage_errors(f"the cache {self.root} cannot be written"),
            locked((self.root / "tmp" / folder.name).with_suffix(".lock")),
        ):
            shutil.rmtree(folder, ignore_errors=True)

    def forget(self, record: Record) -> None:
        """Remove a version's folder, for those who needed it only once."""
        self._remove(self.path(record))

    def _work(self, record: Record) -> Path:
        return self.root / "tmp" / _hex(record)

    def _is_whole(self, record: Record) -> bool:
        return not self._missing(record) and not list(_strangers(self.path(record), record))

    def _missing(self, record: Record) -> list[FileEntry]:
        """What is not there as it was published."""
        folder = self.path(record)
        return [entry for entry in record.manifest.files if not self._is_right(folder / entry.path, entry)]

    def _is_right(self, path: Path, entry: FileEntry) -> bool:
        stamp = _stamp(path)
        if stamp is None:
            return False
        if self._verified.get(path) == stamp:
            return True
        if not _has_content(path, entry):
            return False
        self._verified[path] = stamp
        return True

    def _mend(self, record: Record, progress: Progress | None) -> None:
        """Put what is wrong back in place: the others may be in use, so the folder is never moved away."""
        folder, work = self.path(record), self._work(record)
        for entry in self._missing(record):
            path = folder / entry.path
            if os.path.lexists(path):
                log.warning("%s is not what was published, it is fetched again", path)
            with storage_errors(f"{path} cannot be written"):
                make_folders((work / entry.path).parent)
                make_folders(path.parent)
            self._registry.fetch_file(record, entry.path, work / entry.path, progress=progress)
            with storage_errors(f"{path} cannot be written"):
                if path.is_dir() and not path.is_symlink():
                    shutil.rmtree(path)
                (work / entry.path).replace(path)
        with storage_errors(f"{folder} cannot be written"):
            _remove_strangers(folder, record)
            shutil.rmtree(work, ignore_errors=True)

    def _stamp(self, record: Record) -> None:
        """Remember files that came through `Registry.fetch_file` a moment ago, which checked them."""
        for entry in record.manifest.files:
            path = self.path(record) / entry.path
            if stamp := _stamp(path):
                self._verified[path] = stamp


def fetch_folder(
    registry: Registry,
    record: Record,
    folder: Path,
    *,
    signers: Signers | None = None,
    progress: Progress | None = None,
) -> None:
    """All files of a version in a new folder: whole, or not there.

    What a killed call left beside it, as ``.<name>.<digest>``, is where the next one goes on.

    Raises:
        AlreadyExists: the folder is there and not empty.
        Untrusted, IntegrityError, NotFound, StorageError: as `Cache.fetch`.
    """
    (signers or Signers()).require(registry, record)
    work = folder.parent / f".{folder.name}.{_hex(record)[:12]}"
    if _is_taken(folder):
        raise _taken(folder)
    with locked(work.with_name(work.name + ".lock")):
        _assemble(registry, record, folder, work=work, progress=progress)


def _assemble(registry: Registry, record: Record, folder: Path, *, work: Path, progress: Progress | None) -> None:
    what = f"{folder} cannot be written"
    if _is_taken(folder):
        raise _taken(folder)
    with storage_errors(what):
        make_folders(work)
        make_folders(folder.parent)
        _check_room(work, record)
    try:
        for entry in record.manifest.files:
            with storage_errors(what):
                make_folders((work / entry.path).parent)
            registry.fetch_file(record, entry.path, work / entry.path, progress=progress)
    except (IntegrityError, NotFound):  # no later try gets further
        shutil.rmtree(work, ignore_errors=True)
        raise
    with storage_errors(what):
        _remove_strangers(work, record)
        folder_to_disk(work)
        _move_in(work, folder)
        folder_to_disk(folder.parent)


def _check_room(work: Path, record: Record) -> None:
    """Refuse at once what would fail in the middle, and leave the rest of the disk to others."""
    there = sum(min(max(_size(work / entry.path), 0), entry.size) for entry in record.manifest.files)
    free = shutil.disk_usage(work).free
    if free < record.manifest.size - there:
        raise StorageError(
            f"{record.ref} does not fit on the disk of {work.parent}",
            why=f"{record.manifest.size - there} bytes are missing and {free} are free",
            hint="free some space, then type the same command again",
        )


def _move_in(work: Path, folder: Path) -> None:
    try:
        work.rename(folder)
    except OSError as error:
        if _is_taken(folder):
            raise _taken(folder) from error
        raise


def _is_taken(folder: Path) -> bool:
    return folder.is_symlink() or (folder.exists() and not (folder.is_dir() and not any(folder.iterdir())))


def _taken(folder: Path) -> AlreadyExists:
    return AlreadyExists(f"{folder} is there already", why="nothing is overwritten", hint="name a new folder")


def _strangers(folder: Path, record: Record) -> Iterator[Path]:
    """What no manifest names: an engine could read it all the same."""
    known = {entry.path for entry in record.manifest.files}
    for above, folders, files in os.walk(folder):
        links = [name for name in folders if (Path(above) / name).is_symlink()]
        for name in (*files, *links):
            path = Path(above) / name
            if path.relative_to(folder).as_posix() not in known:
                yield path


def _remove_strangers(folder: Path, record: Record) -> None:
    for path in list(_strangers(folder, record)):
        log.warning("%s was not published, it is removed", path)
        path.unlink(missing_ok=True)


def _has_content(path: Path, entry: FileEntry) -> bool:
    if _size(path) != entry.size:
        return False
    try:
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest() == entry.sha256
    except OSError:
        return False


def _stamp(path: Path) -> Stamp | None:
    """None where no regular file is: a link could point at other bytes tomorrow."""
    try:
        found = path.lstat()
    except OSError:
        return None
    if not path.is_file() or path.is_symlink():
        return None
    return found.st_size, found.st_ino, found.st_mtime_ns, found.st_ctime_ns


def _folders(root: Path) -> Iterator[tuple[float, int, Path]]:
    """(last used, bytes, folder) of each version; one that goes away meanwhile is left out."""
    if not root.is_dir():
        return
    for folder in root.iterdir():
        try:
            size = sum(max(_size(Path(above) / name), 0) for above, _, files in os.walk(folder) for name in files)
            yield folder.stat().st_mtime, size, folder
        except OSError:
            continue


def _size(path: Path) -> int:
    try:
        return path.stat().st_size
    except OSError:
        return -1


def _hex(record: Record) -> str:
    return record.digest.removeprefix("sha256:")
