"""What is being collected, and where bytes go meanwhile: a key that was condemned is not written again.

A delete may arrive late, also after its collector was told that it timed out, and would take what was written to the
same key meanwhile. So a publisher who needs bytes that are condemned stores them beside, at ``<hex>~<epoch>``, and its
record says so.

    condemned/<epoch>.json     from before the first delete
    condemned/<epoch>.closed   after the last one; both go when no delete can be on its way any more
"""

from __future__ import annotations

import time
import uuid
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from adapterhub.errors import IntegrityError, NotFound
from adapterhub.manifest import FORMAT, canonical_json, parse_json
from adapterhub.registry import layout
from adapterhub.registry.entries import check_format
from adapterhub.registry.store import Store, create_hint

LARGEST = 10_000  # blobs of one collection: publishers read all that are open
QUARANTINE = 24 * 3600  # seconds that a closed collection is respected: no request is on its way for so long


@dataclass(frozen=True)
class Collection:
    """Blobs of one tenant that are about to be deleted, unless something turns out to need them."""

    epoch: str  # 13 digits of milliseconds, 8 hex digits
    blobs: frozenset[tuple[str, str]]  # sha256, and the epoch in the key or nothing


def place(sha256: str, collections: Iterable[Collection]) -> str:
    """The epoch of the key where these bytes may be written; nothing for the usual one."""
    touching = [c for c in collections if any(blob[0] == sha256 for blob in c.blobs)]
    condemned = frozenset().union(*(c.blobs for c in touching))
    # a collection never condemns what was stored because of it, so the newest at the latest is free
    return next(e for e in ("", *sorted(c.epoch for c in touching)) if (sha256, e) not in condemned)


class Condemned:
    """What is below ``condemned/`` of each tenant."""

    def __init__(self, store: Store) -> None:
        self._store = store

    def open(self, tenant: str) -> list[Collection]:
        """All that must be respected, the closed ones in quarantine included."""
        found = []
        for key in self._store.keys(layout.collections(tenant)):
            if key.endswith(".json"):
                try:
                    found.append(_from_bytes(self._store.read(key), key=key))
                except NotFound:
                    continue  # its last delete was long ago
        return found

    def begin(self, tenant: str, blobs: Sequence[tuple[str, str]]) -> Collection:
        """Condemn at most `LARGEST` blobs."""
        epoch = f"{int(time.time() * 1000):013d}-{uuid.uuid4().hex[:8]}"
        collection = Collection(epoch, frozenset(blobs))
        create_hint(self._store, layout.condemned(tenant, epoch), _to_bytes(collection))
        return collection

    def close(self, tenant: str, collection: Collection) -> None:
        """By whoever began it, after its last delete was answered: nobody else knows."""
        create_hint(self._store, layout.closed(tenant, collection.epoch))

    def remove_closed(self, tenant: str, *, older_than: float) -> None:
        """Closed collections whose quarantine is over (seconds)."""
        horizon = time.time() - older_than
        for entry in list(self._store.entries(layout.collections(tenant))):
            if entry.key.endswith(".closed") and entry.modified < horizon:
                self._store.delete(entry.key.removesuffix(".closed") + ".json")
                self._store.delete(entry.key)  # last: until then it says that the other may go


def _to_bytes(collection: Collection) -> bytes:
    blobs = sorted(f"{sha256}~{epoch}" if epoch else sha256 for sha256, epoch in collection.blobs)
    return canonical_json({"format": FORMAT, "blobs": blobs})


def _from_bytes(data: bytes, *, key: str) -> Collection:
    raw = parse_json(data, what=key)
    try:
        check_format(raw, key)
        epoch = key.rpartition("/")[2].removesuffix(".json")
        return Collection(epoch, frozenset(layout.blob_of(blob) for blob in raw["blobs"]))
    except (KeyError, TypeError, AttributeError) as error:
        raise IntegrityError(f"{key} cannot be read", why=repr(error)) from error
