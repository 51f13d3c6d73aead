"""The Store in this process's memory: for tests and for trying things out."""

from __future__ import annotations

import hashlib
import threading
from io import BytesIO
from typing import BinaryIO

from adapterhub.errors import AlreadyExists, IntegrityError, NotFound
from adapterhub.registry.store import check_key


class MemoryStore:
    """A dictionary under a lock."""

    def __init__(self, name: str = "") -> None:
        self._name = name
        self._values: dict[str, bytes] = {}
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

    def create_file(self, key: str, source: BinaryIO, *, size: int, sha256: str) -> None:
        if self.exists(key):
            return
        value = source.read()
        if (len(value), hashlib.sha256(value).hexdigest()) != (size, sha256):
            raise IntegrityError(f"{key} was not stored: its bytes are others than announced")
        with self._lock:
            self._values.setdefault(key, value)

    def read(self, key: str) -> bytes:
        check_key(key)
        with self._lock:
            if key not in self._values:
                raise NotFound(f"{key} is not in {self.url}")
            return self._values[key]

    def open(self, key: str) -> BinaryIO:
        return BytesIO(self.read(key))

    def exists(self, key: str) -> bool:
        check_key(key)
        with self._lock:
            return key in self._values

    def keys(self, prefix: str, *, after: str = "", limit: int | None = None) -> list[str]:
        with self._lock:
            return sorted(k for k in self._values if k.startswith(prefix) and k > after)[:limit]

    def folders(self, prefix: str) -> list[str]:
        with self._lock:
            below = {k.removeprefix(prefix).partition("/") for k in self._values if k.startswith(prefix)}
        return sorted({name for name, slash, _ in below if slash})

    def delete(self, key: str) -> None:
        check_key(key)
        with self._lock:
            self._values.pop(key, None)


_STORES: dict[str, MemoryStore] = {}


def memory_store(name: str) -> MemoryStore:
    """The store of that name in this process: the same for everyone who opens ``memory://name``."""
    return _STORES.setdefault(name, MemoryStore(name))
