"""The Store in this process's memory: for tests and for trying things out."""

from __future__ import annotations

import hashlib
import threading
import time
from collections.abc import Iterator
from io import BytesIO
from typing import BinaryIO

from adapterhub.errors import AdapterError, AlreadyExists, IntegrityError, NotFound
from adapterhub.registry.store import Entry, check_key, check_size


class MemoryStore:
    """A dictionary under a lock."""

    def __init__(self, name: str = "") -> None:
        self._name = name
        self._values: dict[str, bytes] = {}
        self._modified: dict[str, float] = {}
        self._lock = threading.Lock()

    @property
    def url(self) -> str:
        return f"memory://{self._name}"

    def create(self, key: str, value: bytes, *, lasting: bool = True) -> None:
        check_key(key)
        with self._lock:
            if key in self._values:
                raise AlreadyExists(f"{key} exists")
            self._values[key] = value
            self._modified[key] = time.time()

    def create_file(self, key: str, source: BinaryIO, *, size: int, sha256: str) -> None:
        if self.exists(key):
            if hashlib.sha256(self.read(key)).hexdigest() != sha256:
                raise IntegrityError(f"the registry's copy of {key} is damaged")
            return
        value = source.read()
        if (len(value), hashlib.sha256(value).hexdigest()) != (size, sha256):
            raise AdapterError(f"{key} was not stored: its bytes are others than announced")
        with self._lock:
            self._values.setdefault(key, value)
            self._modified.setdefault(key, time.time())

    def read(self, key: str) -> bytes:
        check_key(key)
        with self._lock:
            if key not in self._values:
                raise NotFound(f"{key} is not in {self.url}")
            value = self._values[key]
        check_size(key, len(value))
        return value

    def open(self, key: str, *, offset: int = 0) -> BinaryIO:
        check_key(key)
        with self._lock:
            if key not in self._values:
                raise NotFound(f"{key} is not in {self.url}")
            return BytesIO(self._values[key][offset:])

    def exists(self, key: str) -> bool:
        check_key(key)
        with self._lock:
            return key in self._values

    def keys(self, prefix: str, *, after: str = "", limit: int | None = None) -> list[str]:
        with self._lock:
            return sorted(k for k in self._values if k.startswith(prefix) and k > after)[:limit]

    def entries(self, prefix: str) -> Iterator[Entry]:
        with self._lock:
            found = [Entry(k, len(v), self._modified[k]) for k, v in self._values.items() if k.startswith(prefix)]
        yield from sorted(found, key=lambda entry: entry.key)

    def folders(self, prefix: str) -> list[str]:
        with self._lock:
            below = {k.removeprefix(prefix).partition("/") for k in self._values if k.startswith(prefix)}
        return sorted({name for name, slash, _ in below if slash})

    def delete(self, *keys: str) -> None:
        for key in keys:
            check_key(key)
            with self._lock:
                self._values.pop(key, None)
                self._modified.pop(key, None)

    def clear(self, prefix: str) -> None:
        self.delete(*self.keys(prefix))

    def sweep(self, *, older_than: float, dry_run: bool = False) -> int:
        return 0  # nothing is ever unfinished


_STORES: dict[str, MemoryStore] = {}


def memory_store(name: str) -> MemoryStore:
    """The store of that name in this process: the same for everyone who opens ``memory://name``."""
    return _STORES.setdefault(name, MemoryStore(name))
