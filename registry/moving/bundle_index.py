"""What is in a bundle, and its JSON: the first part of the file, read before anything else is believed. No I/O."""

from __future__ import annotations

import hashlib
import re
from base64 import b64decode, b64encode
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import PurePosixPath
from typing import Any

from adapterhub.errors import IntegrityError, InvalidName, Unsupported
from adapterhub.manifest import (
    FORMAT,
    FileEntry,
    Record,
    canonical_json,
    check_distinct,
    from_plain,
    parse_json,
    to_plain,
)
from adapterhub.refs import check_channel
from adapterhub.registry.base import Evaluation, Signature, Version
from adapterhub.registry.moving.copying import Original

INDEX = "bundle.json"
MAX_INDEX = 16 * 2**20  # bytes

_KIND = "adapterhub bundle"
_BESIDE = {".json", ".jinja", ".model", ".txt", ".tiktoken"}  # what a base needs beside its weights; never code
_NAMES = ("LICENSE", "LICENCE", "NOTICE", "USE_POLICY")


@dataclass(frozen=True)
class Bundled:
    """One version, and the channel it was asked by."""

    original: Original
    channel: str | None = None

    @property
    def record(self) -> Record:
        return self.original.record


@dataclass(frozen=True)
class BundledBase:
    """A base model that comes along."""

    name: str
    files: tuple[FileEntry, ...]


@dataclass(frozen=True)
class Index:
    """What is in a bundle."""

    versions: tuple[Bundled, ...]
    base: BundledBase | None

    @property
    def files(self) -> list[FileEntry]:
        """Of all versions and of the base."""
        found = [file for one in self.versions for file in one.record.manifest.files]
        return found + list(self.base.files if self.base else ())

    @cached_property
    def blobs(self) -> dict[str, int]:
        """sha256 → bytes, in the order of the bundle."""
        return {file.sha256: file.size for file in sorted(self.files, key=lambda file: file.sha256)}

    @property
    def size(self) -> int:
        """Bytes of all blobs."""
        return sum(self.blobs.values())

    @property
    def id(self) -> str:
        """Tells bundles apart: 64 hex digits."""
        return hashlib.sha256(to_bytes(self)).hexdigest()


def is_beside(name: str) -> bool:
    """Whether a file of a base comes along with its weights."""
    return not name.startswith(".") and (PurePosixPath(name).suffix in _BESIDE or name.upper().startswith(_NAMES))


def to_bytes(index: Index) -> bytes:
    return canonical_json(
        {
            "format": FORMAT,
            "kind": _KIND,
            "versions": [_version_to_json(one) for one in index.versions],
            "base": to_plain(index.base) if index.base else None,
        }
    )


def from_bytes(data: bytes) -> Index:
    """Raises IntegrityError, Unsupported."""
    raw = parse_json(data, what=INDEX, limit=MAX_INDEX)
    try:
        if raw["kind"] != _KIND:
            raise ValueError(f"it is of the kind {raw['kind']!a}")
        if raw["format"] > FORMAT:
            raise Unsupported(
                f"the bundle has format {raw['format']}, this AdapterHub reads up to {FORMAT}",
                why="it was made by a newer AdapterHub",
                hint="pip install --upgrade adapterhub",
            )
        versions = tuple(map(_version_from_json, raw["versions"]))
        base = _base_from_json(raw["base"]) if raw["base"] else None
        index = Index(versions, base)
        if any(index.blobs[file.sha256] != file.size for file in index.files):
            raise ValueError("one content has two sizes")
    except (KeyError, TypeError, ValueError, AttributeError, RecursionError, InvalidName) as error:
        raise broken(repr(error)) from error
    return index


def _version_to_json(one: Bundled) -> dict[str, Any]:
    return {
        "record": one.record.to_json(),
        "status": one.original.version.status,
        "why": one.original.version.why,
        "channel": one.channel,
        "evaluations": [to_plain(evaluation) for evaluation in one.original.evaluations],
        "signatures": [{"key": s.key, "bundle": b64encode(s.bundle).decode()} for s in one.original.signatures],
    }


def _version_from_json(raw: Mapping[str, Any]) -> Bundled:
    record = Record.from_bytes(canonical_json(raw["record"]))
    if raw["status"] not in ("active", "deprecated"):
        raise ValueError(f"a version is {raw['status']!a}")
    signatures = tuple(Signature(_key(s["key"]), b64decode(s["bundle"], validate=True)) for s in raw["signatures"])
    evaluations = tuple(from_plain(Evaluation, e) for e in raw["evaluations"])
    if raw["channel"] is not None:
        check_channel(raw["channel"])
    return Bundled(Original(Version(record, raw["status"], str(raw["why"])), evaluations, signatures), raw["channel"])


def _key(text: str) -> str:
    if not re.fullmatch(r"[0-9a-f]{64}", text):  # it becomes part of a key
        raise ValueError(f"{text[:100]!a} is no key's id")
    return text


def _base_from_json(raw: Mapping[str, Any]) -> BundledBase:
    files = tuple(from_plain(FileEntry, file) for file in raw["files"])
    check_distinct([file.path for file in files])
    for file in files:
        if "/" in file.path or not (file.path.endswith(".safetensors") or is_beside(file.path)):
            raise ValueError(f"{file.path[:100]!a} is no part of a base")
    return BundledBase(str(raw["name"]), files)


def broken(why: str) -> IntegrityError:
    return IntegrityError("the bundle is broken", why=why, hint="copy it again, or make it again with `ah bundle`")
