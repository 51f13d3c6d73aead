"""``registry.json``: what a registry is, written once, before its first version.

It also keeps whether the registry stands on a store that cannot create unless absent. Such a registry is safe with one
writer alone; who opens it says so in its address, every time, and can never say it by accident.
"""

from __future__ import annotations

import json
import uuid
from dataclasses import dataclass

from adapterhub.errors import IntegrityError, NotFound, UnsafeStore, Unsupported
from adapterhub.manifest import FORMAT, canonical_json
from adapterhub.registry import layout
from adapterhub.registry.store import Guarded, Store, create_hint


@dataclass(frozen=True)
class Identity:
    """What ``registry.json`` says."""

    format: int
    id: str
    single_writer: bool = False


def found(store: Store) -> Identity | None:
    """What a store's registry is; none where nothing was ever published.

    Raises:
        Unsupported: a newer AdapterHub laid it out.
        UnsafeStore: it has a single writer and the address does not say so, or the other way round.
        IntegrityError: it is something else.
    """
    try:
        plain = json.loads(store.read(layout.REGISTRY))
        identity = Identity(int(plain["format"]), str(plain.get("id", "")), bool(plain.get("single_writer", False)))
    except NotFound:
        return None
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise IntegrityError(f"{store.url} is not a registry", why=f"{layout.REGISTRY}: {error!r}") from error
    if identity.format > FORMAT:
        raise Unsupported(
            f"{store.url} has format {identity.format}, this AdapterHub reads up to {FORMAT}",
            why="it was made by a newer AdapterHub",
            hint="pip install --upgrade adapterhub",
        )
    _check_writers(store, identity)
    return identity


def founded(store: Store) -> Identity:
    """Prove the store, then say what it is from now on. Raises UnsafeStore."""
    from adapterhub.registry.doctor import prove

    prove(store)
    plain = {"format": FORMAT, "id": uuid.uuid4().hex} | ({"single_writer": True} if _is_single(store) else {})
    create_hint(store, layout.REGISTRY, canonical_json(plain))
    identity = found(store)  # not always ours: two may publish the first version at once
    if identity is None:
        raise UnsafeStore(f"{store.url} cannot hold a registry", why="it lost what was just written")
    return identity


def _check_writers(store: Store, identity: Identity) -> None:
    if identity.single_writer and not _is_single(store):
        raise UnsafeStore(
            f"{store.url} is a registry with a single writer, and its address does not say so",
            why="its store overwrites what it should create once, so two writers at once would lose versions",
            hint="add single_writer=true to the address, and write from one process alone",
        )
    if _is_single(store) and not identity.single_writer:
        raise UnsafeStore(
            f"{store.url} is a registry with many writers",
            why="its store creates a key once; single_writer=true would give that up",
            hint="take single_writer=true out of the address",
        )


def _is_single(store: Store) -> bool:
    return isinstance(store, Guarded) and store.single_writer
