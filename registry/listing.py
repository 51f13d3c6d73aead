"""The overview of a tenant in a few requests, however many adapters: a snapshot, and what happened since.

    newest snapshot       LIST idx/, GET
    events since          LIST log/: each names its adapter
    adapters they name    LIST, and GET what is new there
    everything            LIST a/: without a snapshot, after many events, and once a day, because hints can be lost

A reader who read much leaves a new snapshot for the next; one who may not write goes without.
"""

from __future__ import annotations

import time
import uuid
from collections.abc import Iterable, Mapping
from contextlib import suppress

from adapterhub.errors import AdapterHubError, IntegrityError, NotFound, Unsupported
from adapterhub.refs import AdapterName
from adapterhub.registry import changelog, layout, snapshots
from adapterhub.registry.base import Overview
from adapterhub.registry.lifecycle import tombstones
from adapterhub.registry.overview import Found, Overviews, Seen, found
from adapterhub.registry.parallel import side_by_side
from adapterhub.registry.snapshots import Snapshot
from adapterhub.registry.store import Store

_DAY = 24 * 3600  # seconds
# S3 refuses clocks that are more than 15 minutes off, so the times of two writers are at most 30 apart.
_APART = 30 * 60  # seconds
# The hint comes before the commit: what was announced so shortly before a look is looked at again.
_UNDER_WAY = 5 * 60  # seconds
_WORTH = 64  # adapters and versions that were read anew: then a snapshot spares the next reader
_KEPT = 3  # snapshots


class Listing:
    """Reads and writes what is below ``idx/`` of each tenant."""

    def __init__(self, store: Store) -> None:
        self._store = store
        self._overviews = Overviews(store)

    def overview(self, tenant: str) -> list[Overview]:
        """As `base.Registry.overview`."""
        now = time.time()
        before = self._newest(tenant)
        after = self._look(tenant, before, now)
        known = before.adapters if before else {}
        overdue = before is not None and before.scanned != after.scanned
        if overdue or _read_anew(known, after.adapters) >= _WORTH:
            with suppress(AdapterHubError):  # a reader with no right to write, a full disk: it was only to spare others
                self._write(tenant, after, now)
        return [seen.overview for _, seen in sorted(after.adapters.items())]

    def reindex(self, tenant: str) -> int:
        """Read everything again and write a snapshot; how many adapters it has. Raises StorageError."""
        now = time.time()
        snapshot = self._scan(tenant, {}, now, list(changelog.newer(self._store, tenant, _cursor(tenant, now))))
        self._write(tenant, snapshot, now)
        return len(snapshot.adapters)

    # ── look ─────────────────────────────────────────────────────────────────────────────────────────────────

    def _newest(self, tenant: str) -> Snapshot | None:
        """The newest that can be read: one that is damaged is passed over, and so is a newer format."""
        for key in self._store.keys(layout.snapshots(tenant), limit=_KEPT):
            with suppress(IntegrityError, NotFound, Unsupported):
                return snapshots.from_bytes(self._store.read(key), tenant=tenant, key=key)
        return None

    def _look(self, tenant: str, before: Snapshot | None, now: float) -> Snapshot:
        if before is None:
            return self._scan(tenant, {}, now, list(changelog.newer(self._store, tenant, _cursor(tenant, now))))
        events = list(changelog.newer(self._store, tenant, max(before.cursor, _cursor(tenant, now))))
        told = (layout.event_of(tenant, key) for key in events if key not in before.counted and key < before.cursor)
        touched = {event[0] for event in told if event is not None}
        if abs(now - before.scanned) > _DAY or len(touched) > max(_WORTH, len(before.adapters) // 50):
            return self._scan(tenant, before.adapters, now, events)
        names = sorted(touched)
        keys = side_by_side(lambda name: self._store.keys(layout.adapter(name)), names)
        changed = dict(one for its in keys for one in found(its, tenant))
        read = self._overviews.read(changed, before.adapters)
        kept = {name: seen for name, seen in before.adapters.items() if name not in touched}
        return _snapshot(tenant, before.scanned, now, events, kept | read)

    def _scan(self, tenant: str, known: Mapping[AdapterName, Seen], now: float, events: list[str]) -> Snapshot:
        there: dict[AdapterName, Found] = dict(found(self._store.keys(layout.adapters(tenant)), tenant))
        return _snapshot(tenant, now, now, events, self._overviews.read(there, known))

    # ── write ────────────────────────────────────────────────────────────────────────────────────────────────

    def _write(self, tenant: str, snapshot: Snapshot, now: float) -> None:
        key = layout.snapshot(tenant, int(now * 1000), uuid.uuid4().hex)
        self._store.create(key, snapshots.to_bytes(snapshot), lasting=False)
        if tombstones.is_gone(self._store, tenant):  # deleted since it was looked at: nothing of it may stay
            tombstones.clear(self._store, tenant)
            return
        self._store.delete(*self._store.keys(layout.snapshots(tenant))[_KEPT:])


def _cursor(tenant: str, now: float) -> str:
    return layout.events_at(tenant, int((now - _APART) * 1000))


def _snapshot(
    tenant: str, scanned: float, now: float, events: Iterable[str], adapters: Mapping[AdapterName, Seen]
) -> Snapshot:
    """``events`` were listed before the adapters were: those that were over by then are counted."""
    cursor, under_way = _cursor(tenant, now), layout.events_at(tenant, int((now - _UNDER_WAY) * 1000))
    return Snapshot(scanned, cursor, frozenset(key for key in events if under_way < key < cursor), adapters)


def _read_anew(before: Mapping[AdapterName, Seen], after: Mapping[AdapterName, Seen]) -> int:
    """Adapters and versions that were not known as they are now."""
    changed = [name for name, seen in after.items() if name not in before or before[name].found != seen.found]
    unknown = (set(after[n].found.versions) - set(before[n].found.versions if n in before else ()) for n in changed)
    return len(changed) + sum(map(len, unknown))
