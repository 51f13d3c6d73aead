"""Where a model is made before it has its name: a folder beside the target, renamed when all in it is durable.

    .support-merged.exporting/       locked by the export that works in it
        .journal                     what it is made from; each file that is finished
        model-00001-of-00002.safetensors …

A killed export leaves this folder and nothing else. The next export to the same target takes it over: finished files
are kept where the journal says that they come from the same base, adapter and options, everything else is deleted.
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
    """A folder in which a model is made. ``finished`` are the names of weight files that are whole and durable."""

    folder: Path
    to: Path
    finished: set[str] = field(default_factory=set)

    def record(self, name: str) -> None:
        """Note that a file is whole and durable, durably."""
        with (self.folder / _JOURNAL).open("a", encoding="utf-8") as journal:
            journal.write(json.dumps({"finished": name}) + "\n")
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


@contextmanager
def staged(to: Path, *, key: str) -> Iterator[Staging]:
    """The staging folder of a target, locked. ``key`` tells what the model is made from.

    Left with an error of ours or of the disk, the folder is deleted; left by a signal, it stays for the next export.

    Raises:
        Conflict: another export to the same target is under way.
        StorageError: the disk is full, or the folder cannot be written.
    """
    folder = to.parent / f".{to.name}.exporting"
    try:
        to.parent.mkdir(parents=True, exist_ok=True)
        folder.mkdir(exist_ok=True)
        with _locked(folder):
            try:
                yield Staging(folder, to, _take_over(folder, key))
            except (AdapterHubError, OSError, MemoryError):
                shutil.rmtree(folder, ignore_errors=True)
                raise
    except OSError as error:
        raise StorageError(
            f"the export to {to} broke off, and nothing of it is left",
            why=f"{error.strerror or error}" + (f": {error.filename}" if error.filename else ""),
            hint="make room or name another folder with --to, then run the same command again",
        ) from error


def _take_over(folder: Path, key: str) -> set[str]:
    """Names of finished files; everything else in the folder is deleted, and the journal is begun anew."""
    finished = _read_journal(folder / _JOURNAL, key) & {path.name for path in folder.iterdir()}
    for path in folder.iterdir():
        if path.name not in finished:
            shutil.rmtree(path) if path.is_dir() else path.unlink()
    lines = [{"key": key}, *({"finished": name} for name in sorted(finished))]
    (folder / _JOURNAL).write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    return finished


def _read_journal(path: Path, key: str) -> set[str]:
    if not path.is_file():
        return set()
    lines = path.read_text(encoding="utf-8").split("\n")[:-1]  # what a kill cut off has no line end
    if not lines or lines[0] != json.dumps({"key": key}):
        return set()
    return {json.loads(line)["finished"] for line in lines[1:]}


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
