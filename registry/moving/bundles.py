"""Versions in one file, for sites without network: adapters, signatures and evaluations, and the base if wanted.

    bundle.json          which versions and which base, with the sha256 of every file (`bundle_index`): checked whole
    blobs/<sha256>       each content once, in order

The same versions make the same file, byte for byte. A reader takes nothing from it that the first part does not name,
and checks every byte before it is used: records against digests, files against hashes, signatures offline.
"""

from __future__ import annotations

import hashlib
import io
import os
import re
import shutil
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO

from adapterhub.errors import AlreadyExists, IntegrityError, StorageError
from adapterhub.manifest import FileEntry, Record
from adapterhub.registry.base import Progress, Registry
from adapterhub.registry.files import copy_hashed, folder_to_disk, hashed, make_folders, storage_errors, to_disk
from adapterhub.registry.locks import locked
from adapterhub.registry.moving import tarball
from adapterhub.registry.moving.bundle_index import (
    INDEX,
    MAX_INDEX,
    Bundled,
    BundledBase,
    Index,
    broken,
    from_bytes,
    is_beside,
    to_bytes,
)
from adapterhub.registry.moving.copying import Files, Landed, land, point
from adapterhub.registry.signing import Signers

if TYPE_CHECKING:
    from adapterhub.base import BaseModel  # imports numpy; only its caller needs it


@dataclass(frozen=True)
class Opened:
    """A bundle that was unpacked to be used in place."""

    index: Index
    registry: str  # URL
    base: Path | None  # the base model's folder, where it came along


# ── write ────────────────────────────────────────────────────────────────────────────────────────────────────────


def write(
    path: Path,
    versions: Sequence[Bundled],
    *,
    files: Files,
    base: BaseModel | None = None,
    progress: Progress | None = None,
) -> Index:
    """Pack versions into a new file. ``files`` gives a verified folder of each.

    Raises AlreadyExists, BaseMismatch where a version was not trained on ``base``, StorageError.
    """
    if path.exists():
        raise AlreadyExists(f"{path} is there already", why="nothing is overwritten", hint="name a new file with --to")
    sources: dict[str, Path] = {}
    for one in versions:
        folder = files(one.record)
        sources |= {file.sha256: folder / file.path for file in one.record.manifest.files}
    bundled_base = _pack_base(base, versions, sources) if base else None
    index = Index(tuple(sorted(versions, key=lambda one: (one.record.name, one.record.version))), bundled_base)
    unfinished = path.with_name(f".{path.name}.part")
    try:
        with storage_errors(f"{path} cannot be written"):
            make_folders(path.absolute().parent)
            with unfinished.open("wb") as target:
                _write(target, index, sources, progress)
                to_disk(target)
            unfinished.rename(path)
            folder_to_disk(path.absolute().parent)
    finally:
        unfinished.unlink(missing_ok=True)
    return index


def _write(target: BinaryIO, index: Index, sources: Mapping[str, Path], progress: Progress | None) -> None:
    head = to_bytes(index)
    sha256 = hashlib.sha256(head).hexdigest()
    tarball.write_member(target, INDEX, io.BytesIO(head), size=len(head), sha256=sha256)
    for sha256, size in index.blobs.items():
        with sources[sha256].open("rb") as source:
            tarball.write_member(target, f"blobs/{sha256}", source, size=size, sha256=sha256)
        if progress:
            progress(size)
    tarball.write_end(target)


def _pack_base(base: BaseModel, versions: Sequence[Bundled], sources: dict[str, Path]) -> BundledBase:
    for one in versions:
        recorded = one.record.manifest.base
        if recorded is not None:
            base.check(recorded, what=str(one.record.ref))
    beside = [p for p in base.path.iterdir() if p.is_file() and is_beside(p.name)]
    entries = []
    for path in sorted({*base.weight_files, *beside}):
        with storage_errors(f"{path} cannot be read"), path.open("rb") as file:
            size, sha256 = hashed(file)
        sources[sha256] = path
        entries.append(FileEntry(path.name, size, sha256))
    return BundledBase(base.name, tuple(entries))


# ── read ─────────────────────────────────────────────────────────────────────────────────────────────────────────


def unpack(
    path: Path,
    folder: Path,
    *,
    signers: Signers | None = None,
    with_base: bool = True,
    progress: Progress | None = None,
) -> Index:
    """Take a bundle apart, checked: ``folder/versions/<digest>/…`` and ``folder/base/<name>/…``.

    Without ``with_base`` the base is checked, and not kept.

    Raises:
        IntegrityError: not a bundle, cut, changed, or made to harm; nothing of it is to be used.
        Untrusted: a version that none of ``signers`` signed; nothing was unpacked.
        StorageError: no room, not writable.
    """
    with storage_errors(f"{path} cannot be read"), path.open("rb") as source:
        index = _read_index(source)
        for one in index.versions:
            (signers or Signers()).check(one.record, one.original.signatures)
        kept = list(_places(index, folder, with_base=with_base))
        with storage_errors(f"{folder} cannot be written"):
            make_folders(folder / "blobs")
            _check_room(folder, {file.sha256: file.size for file, _ in kept})
            _unpack_blobs(source, index, folder / "blobs", {file.sha256 for file, _ in kept}, progress)
            for file, place in kept:
                _name(folder / "blobs" / file.sha256, place)
            shutil.rmtree(folder / "blobs")
    return index


def opened(path: Path, below: Path, *, signers: Signers | None = None, progress: Progress | None = None) -> Opened:
    """A registry and a base made of a bundle and of nothing else, in a folder of its own; the next time it is there.

    Versions keep their numbers, and the channels they were asked by point at them. Raises as `unpack`.
    """
    from adapterhub.registry.local import LocalStore
    from adapterhub.registry.objects import ObjectRegistry

    index = read_index(path)
    folder, work = below / index.id[:32], below / f".{index.id[:32]}"
    with locked(below / f"{index.id[:32]}.lock"):
        for one in index.versions:
            (signers or Signers()).check(one.record, one.original.signatures)
        if not folder.is_dir():
            shutil.rmtree(work, ignore_errors=True)
            try:
                unpack(path, work, signers=signers, progress=progress)
                registry = ObjectRegistry(LocalStore(work / "registry"))
                bring(index, work, registry, same_number=True, channels=True, who="bundle")
                with storage_errors(f"{folder} cannot be written"):
                    shutil.rmtree(work / "versions")
                    work.rename(folder)
            finally:
                shutil.rmtree(work, ignore_errors=True)
    base = base_folder(folder, index.base) if index.base else None
    return Opened(index, (folder / "registry").absolute().as_uri(), base)


def read_index(path: Path) -> Index:
    """What is in a bundle, by its first part. Raises IntegrityError, Unsupported, StorageError."""
    with storage_errors(f"{path} cannot be read"), path.open("rb") as source:
        return _read_index(source)


def version_folder(folder: Path, record: Record) -> Path:
    """Where `unpack` puts a version's files."""
    return folder / "versions" / record.digest.removeprefix("sha256:")


def base_folder(folder: Path, base: BundledBase) -> Path:
    """Where `unpack` puts the base: a folder with the model's own name, for people."""
    name = re.sub(r"[^A-Za-z0-9._-]+", "-", base.name.rpartition("/")[2]).strip(".-") or "model"
    return folder / "base" / name[:100]


def bring(
    index: Index, folder: Path, target: Registry, *, same_number: bool = False, channels: bool = False, who: str
) -> list[Landed]:
    """Make what `unpack` put into ``folder`` versions of ``target``, oldest number first; each once.

    ``channels`` points the channels that the versions were asked by at them. Raises as `copying.land`.
    """
    landed = []
    for one in index.versions:
        number = one.record.version if same_number else None
        done = land(one.original, lambda record: version_folder(folder, record), target, number=number)
        if channels and one.channel is not None:
            point(target, done.record, one.channel, who=who, why="from a bundle")
        landed.append(done)
    return landed


def _read_index(source: BinaryIO) -> Index:
    with tarball.member(source) as found:
        if found is None or found[0] != INDEX or found[1] > MAX_INDEX:
            raise IntegrityError(
                "this is no bundle of AdapterHub",
                why=f"it does not begin with a {INDEX} of at most {MAX_INDEX} bytes",
                hint="make one with `ah bundle`",
            )
        return from_bytes(found[2].read())


def _unpack_blobs(source: BinaryIO, index: Index, folder: Path, wanted: set[str], progress: Progress | None) -> None:
    for sha256, size in index.blobs.items():
        with tarball.member(source) as found:
            if found is None or found[:2] != (f"blobs/{sha256}", size):
                raise broken(
                    f"where blobs/{sha256} of {size} bytes must stand is {found[0][:100] if found else None!a}"
                )
            if _unpack(found[2], folder / sha256 if sha256 in wanted else None) != (size, sha256):
                raise broken(f"blobs/{sha256} has other bytes")
        if progress:
            progress(size)
    with tarball.member(source) as found:
        if found is not None:
            raise broken(f"{found[0][:100]!a} is not in its list")


def _unpack(source: BinaryIO, path: Path | None) -> tuple[int, str]:
    """Bytes and sha256 of what was read, and written where there is a ``path``."""
    if path is None:
        return hashed(source)
    with path.open("wb") as target:
        found = copy_hashed(source, target)
        to_disk(target)
    return found


def _places(index: Index, folder: Path, *, with_base: bool) -> Iterator[tuple[FileEntry, Path]]:
    for one in index.versions:
        for file in one.record.manifest.files:
            yield file, version_folder(folder, one.record) / file.path
    if index.base and with_base:
        for file in index.base.files:
            yield file, base_folder(folder, index.base) / file.path


def _name(blob: Path, path: Path) -> None:
    """A second name of the same bytes, or a copy where the disk has no such thing."""
    make_folders(path.parent)
    path.unlink(missing_ok=True)
    try:
        os.link(blob, path)
    except OSError:
        shutil.copyfile(blob, path)


def _check_room(folder: Path, sizes: Mapping[str, int]) -> None:
    needed, free = sum(sizes.values()), shutil.disk_usage(folder).free
    if free < needed:
        raise StorageError(
            f"the bundle does not fit on the disk of {folder}",
            why=f"it unpacks to {needed} bytes and {free} are free",
            hint="free some space, then type the same command again",
        )
