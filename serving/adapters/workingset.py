"""What a replica had loaded, kept beside its cache: a restarted one loads it again before anyone asks.

It is a hint. What cannot be read is no working set, and what is in it is looked up in the registry as if it was asked
for: a version that was yanked meanwhile is not loaded.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict, dataclass
from pathlib import Path

from adapterhub.registry.files import make_folders, storage_errors


@dataclass(frozen=True)
class WorkingSet:
    """By name, so that a person can read the file."""

    versions: tuple[str, ...] = ()  # loaded, least recently used first
    references: tuple[str, ...] = ()  # that were asked for: channels and bare names are followed from the start
    pins: tuple[str, ...] = ()  # versions that an operator wants to be kept


def path_of(cache: Path, *, registry: str, base: str) -> Path:
    """One file for each registry and base (its digest): servers of several may share a cache."""
    key = hashlib.sha256(f"{registry}\0{base}".encode()).hexdigest()[:16]
    return cache / "working-sets" / f"{key}.json"


def read(path: Path) -> WorkingSet:
    """Empty where there is none."""
    try:
        raw = json.loads(path.read_bytes())
        return WorkingSet(**{part: tuple(map(str, raw.get(part, ()))) for part in ("versions", "references", "pins")})
    except (OSError, ValueError, AttributeError, TypeError, RecursionError):
        return WorkingSet()


def write(path: Path, working: WorkingSet) -> None:
    """Whole or not at all. Raises StorageError."""
    with storage_errors(f"{path} cannot be written"):
        make_folders(path.parent)
        beside = path.with_suffix(".new")
        beside.write_text(json.dumps(asdict(working), indent=1))
        beside.replace(path)
