"""The doctor must see a store that lies: each of these breaks one promise, as some real servers do."""

from __future__ import annotations

import threading

import pytest

from adapterhub.errors import AlreadyExists, UnsafeStore
from adapterhub.registry import Draft, ObjectRegistry
from adapterhub.registry.doctor import WRITERS, prove
from adapterhub.registry.memory import MemoryStore


class Overwrites(MemoryStore):
    """Answers "created" whether the key was there or not."""

    def create(self, key: str, value: bytes, *, lasting: bool = True) -> None:
        self.delete(key)
        super().create(key, value, lasting=lasting)


class ChecksThenWrites(MemoryStore):
    """Looks whether the key is there, then writes: two steps, and others in between."""

    def __init__(self) -> None:
        super().__init__()
        self._everybody_looked = threading.Barrier(WRITERS)

    def create(self, key: str, value: bytes, *, lasting: bool = True) -> None:
        if self.exists(key):
            raise AlreadyExists(key)
        if key.endswith("race"):
            self._everybody_looked.wait(timeout=10)
            self.delete(key)
        super().create(key, value, lasting=lasting)


class ListsLate(MemoryStore):
    def keys(self, prefix: str, *, after: str = "", limit: int | None = None) -> list[str]:
        return super().keys(prefix, after=after, limit=limit)[1:]


class ForgetsValues(MemoryStore):
    def read(self, key: str) -> bytes:
        return super().read(key)[:0]


@pytest.mark.parametrize("kind", [Overwrites, ChecksThenWrites, ListsLate, ForgetsValues])
def test_a_store_that_breaks_a_promise_is_refused(kind: type[MemoryStore]) -> None:
    with pytest.raises(UnsafeStore) as refused:
        prove(kind())
    assert refused.value.why


def test_a_registry_is_proven_before_its_first_version(new_draft, name) -> None:  # type: ignore[no-untyped-def]
    store = Overwrites()
    adapter: Draft = new_draft()
    with pytest.raises(UnsafeStore):
        ObjectRegistry(store).publish(adapter, name=name, author="ana")
    assert store.keys("t/") == []
