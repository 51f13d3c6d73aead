"""The records of versions in a store: read, found by number and by digest. Writing one is `publishing`."""

from __future__ import annotations

from collections.abc import Iterator

from adapterhub.errors import IntegrityError
from adapterhub.manifest import Record
from adapterhub.refs import AdapterName
from adapterhub.registry import layout
from adapterhub.registry.store import Store

_PAGE = 1000  # keys a LIST


class Records:
    """What is below ``v/`` and ``d/`` of each adapter."""

    def __init__(self, store: Store) -> None:
        self._store = store

    def newest_number(self, name: AdapterName) -> int:
        """0 where the adapter has no version."""
        keys = self._store.keys(layout.versions(name), limit=1)
        return layout.number_of(keys[0]) if keys else 0

    def numbers(self, name: AdapterName) -> Iterator[int]:
        """Numbers of all versions, newest first, a page at a time."""
        after = ""
        while page := self._store.keys(layout.versions(name), after=after, limit=_PAGE):
            yield from map(layout.number_of, page)
            if len(page) < _PAGE:
                return
            after = page[-1]

    def read(self, name: AdapterName, number: int) -> Record:
        """Raises NotFound, IntegrityError."""
        key = layout.version(name, number)
        try:
            record = Record.from_bytes(self._store.read(key))
        except IntegrityError as error:
            raise IntegrityError(
                f"the record of {name}@{number} cannot be used: {error.what}",
                why=error.why,
                hint=error.hint or f"ah fsck {name}, and restore {key} from a copy",
            ) from error
        if (record.name, record.version) != (name, number):
            raise IntegrityError(f"the record of {name}@{number} is that of {record.ref}")
        return record

    def hinted(self, name: AdapterName, digest: str) -> list[int]:
        """Numbers of versions that may have this digest, newest first: the publisher may have come second."""
        return sorted(map(layout.number_of, self._store.keys(layout.digests(name, digest))), reverse=True)


def blob_key(record: Record, sha256: str) -> str:
    """Where the bytes of one of its files are."""
    return layout.blob(record.name.tenant, sha256, record.epochs.get(sha256, ""))
