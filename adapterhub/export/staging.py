"""Where a model is made before it has its name: a folder beside the target, renamed when all in it is durable.

    .support-merged.exporting/       locked by the export that works in it
        .journal                     what it is made from; how far each file is whole and durable
        model-00001-of-00002.safetensors …

A killed export leaves this folder and nothing else. The next export to the same target takes it over: told to resume,
it keeps what the journal says is durable and comes from the same base, adapter and options; else it begins anew.
"""

from __future__ import annotations

import json
import os
import shutil
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from adapterhub.errors import AdapterHubError, AlreadyExists, Conflict, StorageError
from adapterhub.export.files import sync

_JOURNAL = ".journal"


@dataclass
class Staging:
    """A folder in which a model is made."""

    folder: Path
    to: Path
    finished: set[str] = field(default_factory=set)  # names of weight files that are whole and durable
    partial: dict[str, int] = field(default_factory=dict)  # of others, how many bytes from the start are

    def record(self, name: str) -> None:
        """Note that a file is whole and durable, durably."""
        self._append({"finished": name})

    def record_part(self, name: str, end: int) -> None:
        """Note that the first ``end`` bytes of a file are whole and durable, durably."""
        self._append({"partial": name, "end": end})

    def _append(self, line: dict[str, str | int]) -> None:
        with (self.folder / _JOURNAL).open("a", encoding="utf-8") as journal:
            journal.write(json.dumps(line) + "\n")
            journal.flush()
            os.fsync(journal.fileno())

    def commit(self) -> None:
        """Make the sidecars durable and give the folder its final name. Raises AlreadyExists."""
        for path in self.folder.iterdir():
            if path.suffix != ".safetensors":  # those are durable already
                sync(path)
        (self.folder / _JOURNAL).unlink()
        sync(self.folder)
        if self.to.exists():
            raise AlreadyExists(f"{self.to} exists", why="it was made while this export ran")
        self.folder.rename(self.to)
        sync(self.to.parent)


def left_behind(to: Path) -> int:
    """Bytes on disk of what a killed export to ``to`` left: they are used again, or freed."""
    try:
        return sum(path.stat().st_blocks * 512 for path in _folder(to).iterdir())
    except OSError:
        return 0


@contextmanager
def staged(to: Path, *, key: str, resume: bool = False) -> Iterator[Staging]:
    """The staging folder of a target, locked. ``key`` tells what the model is made from; ``resume`` keeps what a killed
    export left.

    Left with an error of ours or of the disk, the folder is deleted; left by a signal, it stays for the next export.

    Raises:
        Conflict: another export to the same target is under way, or what is to be resumed is another export.
        StorageError: the disk is full, or the folder cannot be written.
    """
    folder = _folder(to)
    try:
        to.parent.mkdir(parents=True, exist_ok=True)
        folder.mkdir(exist_ok=True)
        with _locked(folder):
            staging = _take_over(Staging(folder, to), key, resume=resume)
            try:
                yield staging
            except (AdapterHubError, OSError, MemoryError):
                shutil.rmtree(folder, ignore_errors=True)
                raise
    except OSError as error:
        raise StorageError(
            f"the export to {to} broke off, and nothing of it is left",
            why=f"{error.strerror or error}" + (f": {error.filename}" if error.filename else ""),
            hint="make room or name another folder with --to, then run the same command again",
        ) from error


def _folder(to: Path) -> Path:
    return to.parent / f".{to.name}.exporting"


def _take_over(staging: Staging, key: str, *, resume: bool) -> Staging:
    """Keep what can be gone on with; everything else in the folder is deleted, and the journal is begun anew."""
    folder = staging.folder
    if resume:
        _read_journal(staging, key)
    for path in folder.iterdir():
        if path.name not in staging.finished | staging.partial.keys():
            shutil.rmtree(path) if path.is_dir() else path.unlink()
    lines: list[dict[str, str | int]] = [{"key": key}]
    lines += [{"finished": name} for name in sorted(staging.finished)]
    lines += [{"partial": name, "end": end} for name, end in sorted(staging.partial.items())]
    _replace(folder / _JOURNAL, "".join(json.dumps(line) + "\n" for line in lines))
    return staging


def _read_journal(staging: Staging, key: str) -> None:
    path = staging.folder / _JOURNAL
    lines = path.read_text(encoding="utf-8").split("\n")[:-1] if path.is_file() else []  # the last may be cut off
    if not lines:
        return
    if json.loads(lines[0]) != {"key": key}:
        raise Conflict(
            f"{staging.folder} holds another export",
            why="it has another base, adapter or options than this one",
            hint="give the options that it was begun with, or leave out --resume to begin anew",
        )
    there = {entry.name for entry in staging.folder.iterdir()}
    for entry in map(json.loads, lines[1:]):
        if entry.get("finished") in there:
            staging.finished.add(entry["finished"])
        elif entry.get("partial") in there:
            staging.partial[entry["partial"]] = entry["end"]
    for name in staging.finished:
        staging.partial.pop(name, None)


def _replace(path: Path, text: str) -> None:
    """At once and durably: a kill leaves the old file or the new one."""
    beside = path.with_suffix(".new")
    with beside.open("w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    beside.replace(path)
    sync(path.parent)


@contextmanager
def _locked(folder: Path) -> Iterator[None]:
    """Hold the folder alone. The lock is the kernel's, so a killed process does not leave it behind."""
    if sys.platform == "win32":
        yield
        return
    import fcntl

    descriptor = os.open(folder, os.O_RDONLY)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            taken = not folder.exists() or os.fstat(descriptor).st_ino != folder.stat().st_ino
        except BlockingIOError:
            taken = True
        if taken:
            raise Conflict(
                f"another export works in {folder}", why="two exports have the same target", hint="wait for it to end"
            )
        yield
    finally:
        os.close(descriptor)
