"""From a draft to a version: blobs first, the record last. Creating the record is the commit.

    blobs            by content; what is there is not sent again
    log, d/<digest>  hints: they may name a version that never comes
    v/<n>            the version, whole: n = newest + 1, and again where somebody else took it

What a publish leaves behind when it is killed before the record: blobs and hints that no record names. Nobody sees
them.
"""

from __future__ import annotations

import random
import uuid
from collections.abc import Callable, Mapping
from io import BytesIO
from typing import BinaryIO, cast

from adapterhub.errors import AdapterError, AlreadyExists
from adapterhub.manifest import FileEntry, Record
from adapterhub.refs import AdapterName
from adapterhub.registry import layout, rules
from adapterhub.registry.base import Draft, Progress
from adapterhub.registry.changelog import ChangeLog
from adapterhub.registry.clock import now
from adapterhub.registry.counted import Counted
from adapterhub.registry.files import storage_errors
from adapterhub.registry.records import Records
from adapterhub.registry.store import Store, create_hint

_FIRST_PAUSE, _LONGEST_PAUSE = 0.01, 1.0  # seconds, before jitter


class Publisher:
    """Publishes into one store."""

    def __init__(self, store: Store, *, wait: Callable[[float], None]) -> None:
        """``wait`` sleeps (seconds) between the attempts of publishers that collide."""
        self._store = store
        self._wait = wait
        self._records = Records(store)
        self._log = ChangeLog(store)

    def publish(
        self,
        draft: Draft,
        *,
        name: AdapterName,
        author: str,
        labels: Mapping[str, str],
        number: int | None = None,
        progress: Progress | None = None,
    ) -> Record:
        """As `base.Registry.publish`, on a store that was proven."""
        for file in draft.manifest.files:
            self._send(draft, file, tenant=name.tenant, progress=progress)
        publish_id = uuid.uuid4().hex
        pause = _FIRST_PAUSE
        while True:
            record = Record(
                name=name,
                version=rules.free_number(name, self._records.newest_number(name), number),
                digest=draft.manifest.digest,
                manifest=draft.manifest,
                publish_id=publish_id,
                created=now(),
                author=author,
                verdicts=draft.verdicts,
                labels=labels,
            )
            if self._commit(record):
                return record
            self._wait(random.uniform(0, pause))  # noqa: S311 - jitter, no secret
            pause = min(2 * pause, _LONGEST_PAUSE)

    def _commit(self, record: Record) -> bool:
        """Whether this record is now the version of its number."""
        self._log.announce(record.name, "publish")
        create_hint(self._store, layout.digest(record.name, record.digest, record.version))
        try:
            self._store.create(layout.version(record.name, record.version), record.to_bytes())
        except AlreadyExists:
            # our own record there: the reply was lost, the version was not
            return self._records.read(record.name, record.version).publish_id == record.publish_id
        return True

    def _send(self, draft: Draft, file: FileEntry, *, tenant: str, progress: Progress | None) -> None:
        key = layout.blob(tenant, file.sha256)
        path = draft.path / file.path
        try:
            with storage_errors(f"{path} cannot be read"), _source(draft, file) as source:
                counted = Counted(source, progress)
                self._store.create_file(key, cast(BinaryIO, counted), size=file.size, sha256=file.sha256)
                counted.tell_until(file.size)
        except AdapterError as error:
            raise AdapterError(
                f"{path} changed while it was published", why=error.why, hint="publish it again when it is finished"
            ) from error


def _source(draft: Draft, file: FileEntry) -> BinaryIO:
    replaced = draft.replaced.get(file.path)
    return BytesIO(replaced) if replaced is not None else (draft.path / file.path).open("rb")
