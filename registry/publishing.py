"""From a draft to a version: blobs first, the record last. Creating the record is the commit.

    intents/<id>     what will be named, for collectors; then a look at what they are collecting
    blobs            by content; what is there is not sent again
    …sealed          no collector gave this publish up, nor will one
    log, d/<digest>  hints: they may name a version that never comes
    v/<n>            the version, whole: n = newest + 1, and again in a while (`turns`) where somebody else took it

What a publish leaves behind when it is killed before the record: an intent, and blobs and hints that no record names.
Nobody sees them, and `gc` removes them.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import replace
from io import BytesIO
from typing import BinaryIO, cast

from adapterhub.errors import AdapterError, AlreadyExists, Conflict, IntegrityError
from adapterhub.manifest import FileEntry, Record
from adapterhub.refs import AdapterName
from adapterhub.registry import layout, rules
from adapterhub.registry.base import Draft, Progress
from adapterhub.registry.changelog import ChangeLog
from adapterhub.registry.clock import now
from adapterhub.registry.counted import Counted
from adapterhub.registry.files import storage_errors
from adapterhub.registry.lifecycle.condemned import Condemned, place
from adapterhub.registry.lifecycle.intents import Intent, Intents
from adapterhub.registry.lifecycle.tombstones import clear, is_gone
from adapterhub.registry.parallel import side_by_side
from adapterhub.registry.records import Records, blob_key
from adapterhub.registry.store import Store, create_hint
from adapterhub.registry.turns import pause


class Publisher:
    """Publishes into one store."""

    def __init__(self, store: Store, *, wait: Callable[[float], None]) -> None:
        """``wait`` sleeps (seconds) between the attempts of publishers that collide."""
        self._store = store
        self._wait = wait
        self._records = Records(store)
        self._log = ChangeLog(store)
        self._intents = Intents(store)
        self._condemned = Condemned(store)

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
        record = None
        while record is None:
            record = self._once(draft, name, author, labels, number, progress)
        self._look_again(record)
        return record

    def _once(
        self,
        draft: Draft,
        name: AdapterName,
        author: str,
        labels: Mapping[str, str],
        number: int | None,
        progress: Progress | None,
    ) -> Record | None:
        """None where a collector gave this publish up or doubts it: it was paused for longer than one waits."""
        if number is not None:
            self._free_number(name, number)  # refused before a byte is sent
        intent = self._intents.begin(name, (file.sha256 for file in draft.manifest.files), who=author, number=number)
        may_still_commit = False
        try:
            self._refuse_deleted(name.tenant)
            epochs = self._send_all(draft, tenant=name.tenant, progress=progress)
            if not self._intents.seal(intent):
                return None
            record = Record(
                name=name,
                version=1,
                digest=draft.manifest.digest,
                manifest=draft.manifest,
                publish_id=intent.id,
                created=now(),
                author=author,
                verdicts=draft.verdicts,
                labels=labels,
                epochs=epochs,
            )
            may_still_commit = True  # also where the store goes away: a request may be on its way
            numbered = self._numbered(record, intent)
            may_still_commit = False
            return numbered
        except Conflict:
            may_still_commit = False  # every number that was tried is somebody else's
            raise
        finally:
            if not may_still_commit:
                self._intents.end(intent)

    def _numbered(self, record: Record, intent: Intent) -> Record | None:
        """Committed under the next number, or the intent's; None where it is doubted and not committed.

        Raises Conflict where the intent's number is taken.
        """
        while True:
            self._log.announce(record.name, "publish")  # each time: watchers look again for ten seconds only
            start = time.monotonic()
            record = replace(record, version=self._free_number(record.name, intent.number), created=now())
            if self._intents.is_doubted(intent):
                return None
            if self._commit(record):
                return record
            took = time.monotonic() - start
            self._wait(pause(crowd=self._intents.committing(record.name.tenant), took=took))

    def _refuse_deleted(self, tenant: str) -> None:
        if is_gone(self._store, tenant):
            raise rules.tenant_gone(tenant)

    def _look_again(self, record: Record) -> None:
        """No collector of ours takes the bytes; a rule of the bucket or a person might have. And a tenant may go."""
        if is_gone(self._store, record.name.tenant):
            clear(self._store, record.name.tenant)
            raise rules.tenant_gone(record.name.tenant)
        files = record.manifest.files
        there = side_by_side(lambda file: self._store.exists(blob_key(record, file.sha256)), files)
        for file, is_there in zip(files, there, strict=True):
            if not is_there:
                raise IntegrityError(
                    f"{record.ref} was published, and the bytes of {file.path} are gone already",
                    why="something else than `ah gc` deletes below blobs/: a lifecycle rule, or a person",
                    hint=f"stop it, then: ah delete {record.ref} --yes, and publish again",
                )

    def _free_number(self, name: AdapterName, wanted: int | None) -> int:
        return rules.free_number(name, self._records.newest_number(name), wanted)

    def _commit(self, record: Record) -> bool:
        """Whether this record is now the version of its number."""
        create_hint(self._store, layout.digest(record.name, record.digest, record.version))
        try:
            self._store.create(layout.version(record.name, record.version), record.to_bytes())
        except AlreadyExists:
            # our own record there: the reply was lost, the version was not
            return self._records.read(record.name, record.version).publish_id == record.publish_id
        return True

    def _send_all(self, draft: Draft, *, tenant: str, progress: Progress | None) -> dict[str, str]:
        """Store what is not there; sha256 → epoch of what is not at its usual place (`condemned`)."""
        collections = self._condemned.open(tenant)
        epochs = {file.sha256: place(file.sha256, collections) for file in draft.manifest.files}
        for file in draft.manifest.files:
            self._send(draft, file, layout.blob(tenant, file.sha256, epochs[file.sha256]), progress)
        return {sha256: epoch for sha256, epoch in epochs.items() if epoch}

    def _send(self, draft: Draft, file: FileEntry, key: str, progress: Progress | None) -> None:
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
