"""Numbered logs in a store: each entry a key that is created once, the newest listed first.

A channel's moves, a version's statuses and its evaluations are kept so: what is the case now is the newest entry, and
of two writers of one number the second learns that it was late.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Generic, Protocol, TypeVar

from adapterhub.errors import AlreadyExists
from adapterhub.refs import AdapterName
from adapterhub.registry import entries, layout
from adapterhub.registry.base import StatusChange
from adapterhub.registry.parallel import side_by_side
from adapterhub.registry.store import Store


class Numbered(Protocol):
    """An entry knows its place in the log."""

    @property
    def seq(self) -> int: ...


T = TypeVar("T", bound=Numbered)
T_co = TypeVar("T_co", covariant=True)


class Read(Protocol[T_co]):
    """Reads an entry: raises IntegrityError for what is none, Unsupported for a newer format."""

    def __call__(self, data: bytes, *, key: str) -> T_co: ...


class NumberedLog(Generic[T]):
    """The log below one prefix of a store."""

    def __init__(self, store: Store, prefix: str, *, read: Read[T], write: Callable[[T], bytes]) -> None:
        self._store = store
        self._prefix = prefix
        self._read = read
        self._write = write

    def newest(self) -> T | None:
        keys = self._store.keys(self._prefix, limit=1)
        return self._entry(keys[0]) if keys else None

    def all(self, limit: int | None = None) -> list[T]:
        """Newest first; all, or the newest ``limit``."""
        return side_by_side(self._entry, self._store.keys(self._prefix, limit=limit))

    def append(self, entry: T) -> T | None:
        """None when it is now the log's entry of its number; else the entry that was there first.

        After a lost reply that one is the caller's own: it knows it by the operation's id.
        """
        key = layout.numbered(self._prefix, entry.seq)
        try:
            self._store.create(key, self._write(entry))
        except AlreadyExists:
            return self._entry(key)
        return None

    def _entry(self, key: str) -> T:
        return self._read(self._store.read(key), key=key)


def status_changes(store: Store, name: AdapterName, version: int) -> NumberedLog[StatusChange]:
    """The log of a version's status."""
    prefix = layout.status_changes(name, version)
    return NumberedLog(store, prefix, read=entries.status_from_bytes, write=entries.status_to_bytes)
