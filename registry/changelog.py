"""A tenant's change log: hints of what happened, newest first, so that watchers need one LIST a tenant."""

from __future__ import annotations

import time
import uuid
from collections.abc import Iterator
from datetime import UTC, datetime

from adapterhub.refs import AdapterName
from adapterhub.registry import layout
from adapterhub.registry.base import Changes, Event
from adapterhub.registry.store import Store, create_hint

_PAGE = 1000  # keys a LIST
# A hint is written before its commit, and clocks differ: what is younger than this is told again.
_RETELL_MS = 10_000


class ChangeLog:
    """What is below ``log/`` of each tenant."""

    def __init__(self, store: Store) -> None:
        self._store = store

    def announce(self, name: AdapterName, what: str) -> None:
        """Say what is about to be committed. A crash of the machine may lose it: watchers also rescan."""
        key = layout.event(name, int(time.time() * 1000), uuid.uuid4().hex, what)
        create_hint(self._store, key, lasting=False)

    def changes(self, tenant: str, cursor: str = "") -> Changes:
        """One LIST where less than a page happened: the keys tell it all."""
        horizon = layout.events_at(tenant, int(time.time() * 1000) - _RETELL_MS)
        since = cursor or horizon
        events = (_event(tenant, key) for key in newer(self._store, tenant, since))
        return Changes(tuple(event for event in events if event), cursor=min(since, horizon))  # newer keys are smaller


def newer(store: Store, tenant: str, cursor: str) -> Iterator[str]:
    """Keys of the change log that are newer than ``cursor``, newest first. One LIST a page."""
    after = ""
    while page := store.keys(layout.events(tenant), after=after, limit=_PAGE):
        for key in page:
            if key >= cursor:
                return
            yield key
        if len(page) < _PAGE:
            return
        after = page[-1]


def _event(tenant: str, key: str) -> Event | None:
    told = layout.event_of(tenant, key)
    if told is None:
        return None
    name, what, milliseconds = told
    when = datetime.fromtimestamp(milliseconds / 1000, UTC).isoformat(timespec="seconds")
    return Event(key, name, what, when)
