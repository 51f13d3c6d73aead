"""Proves that a store keeps the promises that the registry stands on, or refuses it.

Some object stores answer 200 to "create unless it exists" and overwrite; a registry there would lose versions without
a word. So every registry is tried before its first version is written: see `prove`.
"""

from __future__ import annotations

import time
import uuid
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

from adapterhub.errors import AlreadyExists, UnsafeStore
from adapterhub.registry import layout
from adapterhub.registry.store import Store

WRITERS = 8


@dataclass(frozen=True)
class Proof:
    """One promise that a store kept."""

    promise: str
    seconds: float


def prove(store: Store) -> list[Proof]:
    """Try each promise once, with keys that are removed again.

    Raises:
        UnsafeStore: a promise was broken; the message says which.
        StorageError: the store is away, full or not writable.
    """
    identity = uuid.uuid4().hex
    trials: list[tuple[str, Callable[[Store, str], None]]] = [
        ("what was created is read at once", _read_after_write),
        ("a key is created once", _create_twice),
        (f"of {WRITERS} writers at once one wins", _race),
        ("what was created is listed at once", _list_after_write),
    ]
    try:
        return [_timed(promise, trial, store, identity) for promise, trial in trials]
    finally:
        for key in store.keys(layout.TRIALS):
            if key.startswith(layout.trial(identity, "")):
                store.delete(key)


def _timed(promise: str, trial: Callable[[Store, str], None], store: Store, identity: str) -> Proof:
    start = time.perf_counter()
    trial(store, identity)
    return Proof(promise, time.perf_counter() - start)


def _read_after_write(store: Store, identity: str) -> None:
    key = layout.trial(identity, "read")
    store.create(key, b"1")
    if not store.exists(key) or store.read(key) != b"1":
        raise _broken(store, "it did not give back what was just created")


def _create_twice(store: Store, identity: str) -> None:
    key = layout.trial(identity, "twice")
    store.create(key, b"first")
    try:
        store.create(key, b"second")
    except AlreadyExists:
        if store.read(key) == b"first":
            return
    raise _broken(store, "a second create of one key went through: it overwrites what was published")


def _race(store: Store, identity: str) -> None:
    key = layout.trial(identity, "race")

    def write(writer: int) -> bool:
        try:
            store.create(key, str(writer).encode())
        except AlreadyExists:
            return False
        return True

    with ThreadPoolExecutor(WRITERS) as pool:
        won = [writer for writer, success in enumerate(pool.map(write, range(WRITERS))) if success]
    if [str(writer).encode() for writer in won] != [store.read(key)]:
        raise _broken(store, f"of {WRITERS} writers of one key {len(won)} were told that they had won")


def _list_after_write(store: Store, identity: str) -> None:
    written = [layout.trial(identity, f"list-{n}") for n in range(3)]
    for key in reversed(written):
        store.create(key, b"")
    listed = [key for key in store.keys(layout.TRIALS) if key.startswith(layout.trial(identity, "list-"))]
    if listed != written:
        raise _broken(store, "it did not list what was just created, in order")


def _broken(store: Store, why: str) -> UnsafeStore:
    return UnsafeStore(f"{store.url} cannot hold a registry", why=why, hint="name another store with --registry")
