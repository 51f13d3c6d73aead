"""The Registry over any Store: all of the rules, nothing of a vendor.

Every change of state is one create of a key that was not there (`layout` draws them). What a publish leaves behind
when it is killed: blobs and hints that no record names. Nobody sees them.
"""

from __future__ import annotations

import json
import random
import time
import uuid
from collections.abc import Callable, Iterator, Mapping
from datetime import UTC, datetime
from io import BytesIO
from pathlib import Path
from typing import BinaryIO

from adapterhub.errors import (
    AdapterError,
    AlreadyExists,
    Conflict,
    Gone,
    IntegrityError,
    NotFound,
    Unsupported,
)
from adapterhub.manifest import FORMAT, FileEntry, Record, canonical_json
from adapterhub.refs import LATEST, AdapterName, AdapterRef, check_channel
from adapterhub.registry import entries, layout
from adapterhub.registry.base import (
    Changes,
    ChannelMove,
    Draft,
    Event,
    Status,
    StatusChange,
    Target,
    Version,
)
from adapterhub.registry.channels import check_weights, rollback_targets, standing
from adapterhub.registry.files import copy_hashed, new_file, storage_errors, to_disk
from adapterhub.registry.store import Store

_PAGE = 1000  # keys a LIST
# A hint is written before its commit, and clocks differ: what is younger than this is told again.
_RETELL_MS = 10_000

_GONE: tuple[Status, ...] = ("yanked", "deleted")


class ObjectRegistry:
    """A `base.Registry` over a `store.Store`."""

    def __init__(self, store: Store, *, wait: Callable[[float], None] = time.sleep) -> None:
        """``wait`` sleeps (seconds) between the attempts of publishers that collide."""
        self.store = store
        self._wait = wait
        self._checked = False  # whether registry.json was read, and can be by us

    @property
    def url(self) -> str:
        return self.store.url

    # ── publish ──────────────────────────────────────────────────────────────────────────────────────────────

    def publish(
        self, draft: Draft, *, name: AdapterName, author: str, labels: Mapping[str, str] | None = None
    ) -> Record:
        self._open_for_writing()
        for file in draft.manifest.files:
            self._send(draft, file, tenant=name.tenant)
        publish_id = uuid.uuid4().hex
        pause = 0.01  # seconds
        while True:
            record = Record(
                name=name,
                version=self._newest_number(name) + 1,
                digest=draft.manifest.digest,
                manifest=draft.manifest,
                publish_id=publish_id,
                created=_now(),
                author=author,
                verdicts=draft.verdicts,
                labels=labels or {},
            )
            if self._commit(record):
                return record
            self._wait(random.uniform(0, pause))  # noqa: S311 - jitter, no secret
            pause = min(2 * pause, 1)

    def _commit(self, record: Record) -> bool:
        """Whether this record is now the version of its number."""
        self._announce(record.name, "publish")
        self._hint(layout.digest(record.name, record.digest, record.version))
        try:
            self.store.create(layout.version(record.name, record.version), record.to_bytes())
        except AlreadyExists:
            # our own record there: the reply was lost, the version was not
            return self._record(record.name, record.version).publish_id == record.publish_id
        return True

    def _send(self, draft: Draft, file: FileEntry, *, tenant: str) -> None:
        key = layout.blob(tenant, file.sha256)
        path = draft.path / file.path
        try:
            with storage_errors(f"{path} cannot be read"), _source(draft, file) as source:
                self.store.create_file(key, source, size=file.size, sha256=file.sha256)
        except AdapterError as error:
            raise AdapterError(
                f"{path} changed while it was published", why=error.why, hint="publish it again when it is finished"
            ) from error

    def _mend(self, key: str) -> str:
        return f"restore {self.store.url}/{key} from a copy, or remove it and publish the adapter again"

    def _open_for_writing(self) -> None:
        """The first write of a registry: prove the store, then say what this is."""
        self._open()
        if self._checked:
            return
        from adapterhub.registry.doctor import prove

        prove(self.store)
        self._hint(layout.REGISTRY, canonical_json({"format": FORMAT, "id": uuid.uuid4().hex}))
        self._checked = True

    def _open(self) -> None:
        """Raises Unsupported for a registry that a newer AdapterHub laid out. One that is not there yet is empty."""
        if self._checked:
            return
        try:
            found = json.loads(self.store.read(layout.REGISTRY))["format"]
        except NotFound:
            return
        except (ValueError, KeyError, TypeError) as error:
            raise IntegrityError(f"{self.url} is not a registry", why=f"{layout.REGISTRY}: {error!r}") from error
        if found > FORMAT:
            raise Unsupported(
                f"{self.url} has format {found}, this AdapterHub reads up to {FORMAT}",
                why="it was made by a newer AdapterHub",
                hint="pip install --upgrade adapterhub",
            )
        self._checked = True

    # ── read ─────────────────────────────────────────────────────────────────────────────────────────────────

    def resolve(self, ref: AdapterRef) -> Version:
        self._open()
        if ref.version is not None:
            return self._usable(self._version(ref.name, ref.version), asked=str(ref))
        if ref.digest is not None:
            return self._with_digest(ref)
        if ref.channel == LATEST:
            return self._latest(ref.name)
        move = self._newest_move(ref.name, str(ref.channel))
        if move is None:
            self._require_adapter(ref.name)
            raise NotFound(f"{ref.name} has no channel {ref.channel!r}", hint=f"ah show {ref.name}")
        return self._usable(self._version(ref.name, move.main.version), asked=str(ref))

    def tenants(self) -> list[str]:
        self._open()
        return [tenant for tenant in self.store.folders(layout.TENANTS) if self.adapters(tenant)]

    def adapters(self, tenant: str) -> list[AdapterName]:
        self._open()
        names = (AdapterName(tenant, adapter) for adapter in self.store.folders(layout.adapters(tenant)))
        return [name for name in names if self._newest_number(name)]

    def versions(self, name: AdapterName) -> list[Version]:
        self._require_adapter(name)
        statuses = self._statuses(name)
        numbers = [layout.number_of(key) for key in self.store.keys(layout.versions(name))]
        return [_with_status(self._record(name, n), statuses.get(n)) for n in numbers]

    def fetch_file(self, record: Record, path: str, destination: Path) -> None:
        entry = next((f for f in record.manifest.files if f.path == path), None)
        if entry is None:
            raise NotFound(f"{record.ref} has no file {path!a}", hint=f"ah show {record.ref}")
        what = f"{path} of {record.ref} cannot be copied to {destination}"
        with self._blob(record, entry) as source, storage_errors(what), new_file(destination) as target:
            found = copy_hashed(source, target)
            to_disk(target)
            if found != (entry.size, entry.sha256):
                raise IntegrityError(
                    f"{path} of {record.ref} is not what was published",
                    why=f"{found[0]} bytes with sha256 {found[1][:12]}…, "
                    f"published were {entry.size} with {entry.sha256[:12]}…",
                    hint=self._mend(layout.blob(record.name.tenant, entry.sha256)),
                )

    def _blob(self, record: Record, entry: FileEntry) -> BinaryIO:
        try:
            return self.store.open(layout.blob(record.name.tenant, entry.sha256))
        except NotFound as error:
            raise NotFound(
                f"the bytes of {entry.path} of {record.ref} are not in the registry",
                why=error.what,
                hint="publish the adapter again, or restore the registry from a copy",
            ) from error

    # ── channels ─────────────────────────────────────────────────────────────────────────────────────────────

    def channels(self, name: AdapterName) -> dict[str, ChannelMove]:
        self._require_adapter(name)
        moves = {channel: self._newest_move(name, channel) for channel in self.store.folders(layout.channels(name))}
        return {channel: move for channel, move in moves.items() if move is not None}

    def channel_log(self, name: AdapterName, channel: str) -> list[ChannelMove]:
        check_channel(channel)
        self._require_adapter(name)
        log = [self._move(key) for key in self.store.keys(layout.moves(name, channel))]
        if not log:
            raise NotFound(f"{name} has no channel {channel!r}", hint=f"ah show {name}")
        return log

    def set_channel(
        self,
        name: AdapterName,
        channel: str,
        targets: Mapping[int, int],
        *,
        who: str,
        why: str = "",
        expected: int | None = None,
        force: bool = False,
    ) -> ChannelMove:
        check_channel(channel)
        check_weights(targets)
        self._require_adapter(name)
        chosen = tuple(self._target(name, version, weight) for version, weight in sorted(targets.items()))
        while True:
            current = self._newest_move(name, channel)
            seq = current.seq if current else 0
            if expected is not None and expected != seq and not force:
                raise self._moved(name, channel)
            move = ChannelMove(channel, seq + 1, chosen, "set", why, who, _now(), op=uuid.uuid4().hex)
            if self._append(name, move):
                return move
            if not force:
                raise self._moved(name, channel)

    def rollback(
        self, name: AdapterName, channel: str, *, to: int | None = None, who: str, why: str = ""
    ) -> ChannelMove:
        log = self.channel_log(name, channel)
        targets: tuple[Target, ...]
        if to is not None:
            targets = (self._target(name, to, 100),)
        else:
            statuses = self._statuses(name)
            targets = rollback_targets(log, usable=lambda t: _status(statuses.get(t.version)) not in _GONE)
        move = ChannelMove(
            channel,
            log[0].seq + 1,
            targets,
            "rollback",
            why,
            who,
            _now(),
            op=uuid.uuid4().hex,
            undoes=standing(log)[-1].seq,
        )
        if not self._append(name, move):
            raise self._moved(name, channel)
        return move

    def _append(self, name: AdapterName, move: ChannelMove) -> bool:
        """Whether this move is now the log's entry of its number."""
        self._announce(name, f"channel {move.channel}")
        key = layout.move(name, move.channel, move.seq)
        try:
            self.store.create(key, entries.move_to_bytes(move))
        except AlreadyExists:
            return self._move(key).op == move.op  # true: the reply was lost, the move was not
        return True

    def _moved(self, name: AdapterName, channel: str) -> Conflict:
        move = self._newest_move(name, channel)
        now = f"it is now at {name}@{move.main.version}, moved by {move.who}" if move else "it has no moves yet"
        return Conflict(
            f"the channel {channel!r} of {name} moved meanwhile",
            why=now,
            hint=f"look at `ah channel log {name} {channel}`, then type the command again, or with --force",
        )

    def _target(self, name: AdapterName, version: int, weight: int) -> Target:
        found = self._usable(self._version(name, version), asked=f"{name}@{version}")
        return Target(version, found.record.digest, weight)

    def _newest_move(self, name: AdapterName, channel: str) -> ChannelMove | None:
        keys = self.store.keys(layout.moves(name, channel), limit=1)
        return self._move(keys[0]) if keys else None

    def _move(self, key: str) -> ChannelMove:
        return entries.move_from_bytes(self.store.read(key), key=key)

    # ── statuses ─────────────────────────────────────────────────────────────────────────────────────────────

    def set_status(self, name: AdapterName, version: int, status: Status, *, who: str, why: str = "") -> StatusChange:
        self._version(name, version)
        while True:
            current = self._newest_status(name, version)
            if current is not None and current.status == status:
                return current
            if current is not None and current.status == "deleted":
                raise Gone(f"{name}@{version} is deleted", why="that is final", hint=f"ah ls {name}")
            change = StatusChange((current.seq if current else 0) + 1, status, why, who, _now())
            self._announce(name, f"status {version}")
            try:
                self.store.create(layout.status_change(name, version, change.seq), entries.status_to_bytes(change))
                return change
            except AlreadyExists:
                continue  # somebody changed it meanwhile: judge again

    def status_log(self, name: AdapterName, version: int) -> list[StatusChange]:
        self._version(name, version)
        return [self._status_change(key) for key in self.store.keys(layout.status_changes(name, version))]

    def _newest_status(self, name: AdapterName, version: int) -> StatusChange | None:
        keys = self.store.keys(layout.status_changes(name, version), limit=1)
        return self._status_change(keys[0]) if keys else None

    def _status_change(self, key: str) -> StatusChange:
        return entries.status_from_bytes(self.store.read(key), key=key)

    def _statuses(self, name: AdapterName) -> dict[int, StatusChange]:
        """The present status of each version that ever had one: most have none, so this is a short list."""
        numbers = [int(folder) for folder in self.store.folders(layout.statuses(name))]
        found = {n: self._newest_status(name, n) for n in numbers}
        return {n: change for n, change in found.items() if change is not None}

    # ── changes ──────────────────────────────────────────────────────────────────────────────────────────────

    def changes(self, tenant: str, cursor: str = "") -> Changes:
        horizon = layout.events_at(tenant, int(time.time() * 1000) - _RETELL_MS)
        since = cursor or horizon
        events = (
            entries.event_from_bytes(self.store.read(key), key=key, tenant=tenant)
            for key in self._newer_events(tenant, since)
        )
        return Changes(tuple(events), cursor=min(since, horizon))  # newer keys are smaller

    def _newer_events(self, tenant: str, cursor: str) -> Iterator[str]:
        after = ""
        while page := self.store.keys(layout.events(tenant), after=after, limit=_PAGE):
            for key in page:
                if key >= cursor:
                    return
                yield key
            after = page[-1]

    def _announce(self, name: AdapterName, what: str) -> None:
        key = layout.event(name.tenant, int(time.time() * 1000), uuid.uuid4().hex)
        self._hint(key, entries.event_to_bytes(Event(key, name, what, _now())), lasting=False)

    def _hint(self, key: str, value: bytes = b"", *, lasting: bool = True) -> None:
        """Create a key that only we write, or whose value is the same whoever writes it: one that is there is fine."""
        try:
            self.store.create(key, value, lasting=lasting)
        except AlreadyExists:
            return

    # ── versions ─────────────────────────────────────────────────────────────────────────────────────────────

    def _newest_number(self, name: AdapterName) -> int:
        """0 where the adapter has no version."""
        keys = self.store.keys(layout.versions(name), limit=1)
        return layout.number_of(keys[0]) if keys else 0

    def _version(self, name: AdapterName, number: int) -> Version:
        self._open()
        try:
            record = self._record(name, number)
        except NotFound:
            self._require_adapter(name)
            raise NotFound(f"{name} has no version {number}", hint=f"ah ls {name}") from None
        return _with_status(record, self._newest_status(name, number))

    def _record(self, name: AdapterName, number: int) -> Record:
        record = Record.from_bytes(self.store.read(layout.version(name, number)))
        if (record.name, record.version) != (name, number):
            raise IntegrityError(f"the record of {name}@{number} is that of {record.ref}")
        return record

    def _latest(self, name: AdapterName) -> Version:
        statuses = self._statuses(name)
        after = ""
        while page := self.store.keys(layout.versions(name), after=after, limit=_PAGE):
            for number in map(layout.number_of, page):
                if _status(statuses.get(number)) == "active":
                    return _with_status(self._record(name, number), statuses.get(number))
            after = page[-1]
        self._require_adapter(name)
        raise Gone(
            f"{name} has no active version",
            why="all of them are yanked, deprecated or deleted",
            hint=f"name a version (ah ls {name}), or publish one",
        )

    def _with_digest(self, ref: AdapterRef) -> Version:
        digest = str(ref.digest)
        hints = [layout.number_of(key) for key in self.store.keys(layout.digests(ref.name, digest))]
        found = []
        for number in sorted(hints, reverse=True):
            try:
                version = self._version(ref.name, number)
            except NotFound:
                continue  # the hint of a publisher who came second, or was killed
            if version.record.digest == digest:
                found.append(version)
        if not found:
            self._require_adapter(ref.name)
            raise NotFound(f"{ref.name} has no version with digest {digest}", hint=f"ah ls {ref.name}")
        in_use = [version for version in found if version.status not in _GONE]
        return self._usable((in_use or found)[0], asked=str(ref))

    def _usable(self, version: Version, *, asked: str) -> Version:
        if version.status in _GONE:
            own = str(version.record.ref)
            raise Gone(
                f"{own} is {version.status}" if asked == own else f"{asked} is {own}, which is {version.status}",
                why=version.why,
                hint=f"ah ls {version.record.name}",
            )
        return version

    def _require_adapter(self, name: AdapterName) -> None:
        """Raises NotFound, and says whether it is the tenant or the adapter that is not there."""
        self._open()
        if self._newest_number(name):
            return
        if self.adapters(name.tenant):
            raise NotFound(f"there is no adapter {name} in {self.url}", hint=f"ah ls {name.tenant}")
        raise NotFound(f"there is no tenant {name.tenant!r} in {self.url}", hint="ah ls")


def _source(draft: Draft, file: FileEntry) -> BinaryIO:
    replaced = draft.replaced.get(file.path)
    return BytesIO(replaced) if replaced is not None else (draft.path / file.path).open("rb")


def _with_status(record: Record, change: StatusChange | None) -> Version:
    return Version(record, change.status, change.why) if change else Version(record)


def _status(change: StatusChange | None) -> Status:
    return change.status if change else "active"


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")
