"""Publishes under way, told to the collector; and which of the two has the last word on how one ends.

    intents/<id>.json     first of all: the bytes that the version will name
    intents/<id>.sealed   "commits" by its publisher, or "given up" by a collector: whoever creates it first
    intents/<id>.doubted  by a collector: it sealed long ago, and has no version
    intents/<id>.past     by a collector, after that: the newest version of the adapter

A publisher that was paused for longer than a collector waits finds that it was given up, and starts over. One that
sealed is waited for, but not for ever. Before each number that it tries it looks at the newest version, *then* whether
it is doubted. So the only number that it may still try without knowing of the doubt is at most one above ``past``. Once
that one is somebody else's, it loses, looks, and starts over. No clock decides whether bytes may be deleted
(docs/decisions/0012 and 0025).
"""

from __future__ import annotations

import logging
import uuid
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any, Literal

from adapterhub.errors import AlreadyExists, IntegrityError, InvalidName, NotFound, StorageError
from adapterhub.manifest import FORMAT, canonical_json, parse_json
from adapterhub.refs import AdapterName
from adapterhub.registry import layout
from adapterhub.registry.clock import now
from adapterhub.registry.entries import check_format
from adapterhub.registry.store import Store, create_hint

log = logging.getLogger(__name__)

Seal = Literal["", "commits", "given up"]
_PAGE = 1000  # keys a LIST


@dataclass(frozen=True)
class Intent:
    """What a publish will name."""

    id: str
    name: AdapterName
    digests: frozenset[str]  # sha256 of each file
    who: str
    when: str  # ISO 8601, UTC
    number: int | None = None  # that it wants, and no other
    asks: bool = True  # whether its publisher looks for doubts; false: written before there were any


@dataclass(frozen=True)
class UnderWay:
    """An intent as a collector finds it."""

    intent: Intent
    modified: float  # seconds since 1970, by the store's clock
    seal: Seal
    past: int | None = None  # the newest version of its adapter, at a time when it was doubted already


class Intents:
    """What is below ``intents/`` of each tenant."""

    def __init__(self, store: Store) -> None:
        self._store = store

    # ── the publisher's side ─────────────────────────────────────────────────────────────────────────────────

    def begin(self, name: AdapterName, digests: Iterable[str], *, who: str, number: int | None = None) -> Intent:
        """Tell collectors. A crash of this machine may lose it, but ends the publish too."""
        intent = Intent(uuid.uuid4().hex, name, frozenset(digests), who, now(), number)
        create_hint(self._store, layout.intent(name.tenant, intent.id), _to_bytes(intent), lasting=False)
        return intent

    def seal(self, intent: Intent) -> bool:
        """Whether the publish may commit: no collector gave it up, nor will one."""
        return self._sealed(intent.name.tenant, intent.id, "commits") == "commits"

    def is_doubted(self, intent: Intent) -> bool:
        """Asked after each look at the newest version: then the publish starts over."""
        return self._store.exists(layout.doubt(intent.name.tenant, intent.id))

    def committing(self, tenant: str) -> int:
        """How many publishes are about to commit, or were killed then: one LIST, so a few hundred at most."""
        keys = set(self._store.keys(layout.intents(tenant), limit=_PAGE))
        return sum(key.endswith(".json") and layout.seal_of(key) in keys for key in keys)

    def end(self, intent: Intent) -> None:
        """It committed, or never will. What stays where the store refuses is found by the next collection."""
        tenant = intent.name.tenant
        try:
            self._store.delete(layout.intent(tenant, intent.id))
            self._store.delete(layout.seal(tenant, intent.id))
        except StorageError as error:
            log.warning("the intent of a publish of %s is left over: %s", intent.name, error)

    # ── the collector's side ─────────────────────────────────────────────────────────────────────────────────

    def under_way(self, tenant: str) -> Iterator[UnderWay]:
        """Raises IntegrityError for what is no intent."""
        entries = {entry.key: entry for entry in self._store.entries(layout.intents(tenant))}
        for key, entry in entries.items():
            if key.endswith(".json"):
                try:
                    intent = _from_bytes(self._store.read(key), key=key, tenant=tenant)
                except NotFound:
                    continue  # it ended meanwhile: what it committed is in the records
                yield UnderWay(
                    intent,
                    entry.modified,
                    self._seal(tenant, intent.id, entries),
                    self._past(intent) if layout.past(tenant, intent.id) in entries else None,
                )

    def give_up(self, intent: Intent) -> bool:
        """Whether the publish never commits from now on; else it may, at any time. The seal stays for ever."""
        return self._sealed(intent.name.tenant, intent.id, "given up") == "given up"

    def doubt(self, intent: Intent, *, newest: Callable[[], int]) -> None:
        """``newest`` looks at the newest version of its adapter: after the doubt is there, or it would tell nothing."""
        tenant = intent.name.tenant
        create_hint(self._store, layout.doubt(tenant, intent.id))
        create_hint(self._store, layout.past(tenant, intent.id), str(newest()).encode())

    def forget_given_up(self, intent: Intent) -> None:
        """Its seal and its doubt stay: its publisher may wake up and ask."""
        self._store.delete(layout.intent(intent.name.tenant, intent.id))

    def remove_idle_doubts(self, tenant: str) -> None:
        """Those of publishes that ended: they sealed before they were doubted, and have no seal any more."""
        keys = set(self._store.keys(layout.intents(tenant)))
        stems = {key.rpartition(".")[0] for key in keys}
        over = [stem for stem in stems if f"{stem}.json" not in keys and f"{stem}.sealed" not in keys]
        if idle := [key for stem in over for key in (f"{stem}.doubted", f"{stem}.past") if key in keys]:
            self._store.delete(*idle)

    def _past(self, intent: Intent) -> int | None:
        try:
            return int(self._store.read(layout.past(intent.name.tenant, intent.id)))
        except NotFound:
            return None
        except ValueError as error:
            raise IntegrityError(f"the doubt of publish {intent.id} cannot be read", why=str(error)) from error

    def _seal(self, tenant: str, publish_id: str, entries: dict[str, Any]) -> Seal:
        key = layout.seal(tenant, publish_id)
        return _read_seal(self._store, key) if key in entries else ""

    def _sealed(self, tenant: str, publish_id: str, wanted: Seal) -> Seal:
        key = layout.seal(tenant, publish_id)
        try:
            self._store.create(key, wanted.encode(), lasting=False)
        except AlreadyExists:  # by the other side, or by us and the reply was lost
            return _read_seal(self._store, key)
        return wanted


def _read_seal(store: Store, key: str) -> Seal:
    """An empty one where it is gone: the publish ended."""
    try:
        return "commits" if store.read(key) == b"commits" else "given up"
    except NotFound:
        return ""


def _to_bytes(intent: Intent) -> bytes:
    plain = {"format": FORMAT, "id": intent.id, "adapter": intent.name.adapter, "digests": sorted(intent.digests)}
    return canonical_json(plain | {"who": intent.who, "when": intent.when, "number": intent.number})


def _from_bytes(data: bytes, *, key: str, tenant: str) -> Intent:
    raw = parse_json(data, what=key)
    try:
        check_format(raw, key)
        name = AdapterName(tenant, raw["adapter"])
        return Intent(
            id=str(raw["id"]),
            name=name,
            digests=frozenset(map(str, raw["digests"])),
            who=str(raw["who"]),
            when=str(raw["when"]),
            number=None if raw.get("number") is None else int(raw["number"]),
            asks="number" in raw,
        )
    except (KeyError, TypeError, ValueError, InvalidName) as error:
        raise IntegrityError(
            f"{key} cannot be read", why=repr(error), hint="remove it when no publish is under way"
        ) from error
