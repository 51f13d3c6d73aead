"""Proves that a store keeps the promises that the registry stands on, or refuses it.

Some object stores answer 200 to "create unless it exists" and overwrite; a registry there would lose versions without
a word. So every registry is tried before its first version is written: see `prove`.
"""

from __future__ import annotations

import hashlib
import time
import uuid
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from io import BytesIO

from adapterhub.errors import AlreadyExists, UnsafeStore
from adapterhub.registry import layout
from adapterhub.registry.store import Guarded, Store, create_hint

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
        ("what was created is listed at once, in order", _list_after_write),
        ("a file is whole, and read from its middle", _ranges),
    ]
    if isinstance(store, Guarded) and store.single_writer:
        trials = [(promise, trial) for promise, trial in trials if trial is not _race]
    try:
        return [_timed(promise, trial, store, identity) for promise, trial in trials]
    finally:
        _clean(store, identity)


def notes(store: Store) -> list[str]:
    """What the store's user should know, and is no broken promise."""
    return store.notes() if isinstance(store, Guarded) else []


def _clean(store: Store, identity: str) -> None:
    store.delete(*(key for key in store.keys(layout.TRIALS) if key.startswith(layout.trial(identity, ""))))


def _timed(promise: str, trial: Callable[[Store, str], None], store: Store, identity: str) -> Proof:
    start = time.perf_counter()
    trial(store, identity)
    return Proof(promise, time.perf_counter() - start)


def _read_after_write(store: Store, identity: str) -> None:
    key = layout.trial(identity, "read")
    create_hint(store, key, b"1")  # a reply that was lost is no broken promise
    if not store.exists(key) or store.read(key) != b"1":
        raise _broken(store, "it did not give back what was just created")


def _create_twice(store: Store, identity: str) -> None:
    key = layout.trial(identity, "twice")
    create_hint(store, key, b"first")
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
    # none: the winner's reply was lost, and it was told of its own key
    if won and [str(writer).encode() for writer in won] != [store.read(key)]:
        raise _broken(store, f"of {WRITERS} writers of one key {len(won)} were told that they had won")


def _list_after_write(store: Store, identity: str) -> None:
    written = [layout.trial(identity, f"list-{n}") for n in range(3)]
    for key in reversed(written):
        create_hint(store, key)
    listed = [key for key in store.keys(layout.TRIALS) if key.startswith(layout.trial(identity, "list-"))]
    if listed != written:
        raise _broken(store, "it did not list what was just created, in order")
    later = store.keys(layout.TRIALS, after=written[0], limit=1)
    if later != written[1:2]:
        raise _broken(store, "asked for the first key after another, it named the wrong one")


def _ranges(store: Store, identity: str) -> None:
    key, value = layout.trial(identity, "file"), bytes(range(256)) * 256
    store.create_file(key, BytesIO(value), size=len(value), sha256=hashlib.sha256(value).hexdigest())
    with store.open(key, offset=1000) as stream:
        rest = b"".join(iter(stream.read, b""))
    if rest != value[1000:]:
        raise _broken(store, "it gave other bytes than were asked for from the middle of a file")


def _broken(store: Store, why: str) -> UnsafeStore:
    way_out = store.way_out if isinstance(store, Guarded) else "name another store with --registry"
    return UnsafeStore(f"{store.url} cannot hold a registry", why=why, hint=way_out)
