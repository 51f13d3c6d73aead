"""The Registry over any Store: all of the rules, nothing of a vendor.

Every change of state is one create of a key that was not there (`layout` draws them):

    publishing    draft → blobs → record          records     what was published
    logs          channels, statuses, evaluations changelog   what may have happened, for watchers
"""

from __future__ import annotations

import time
import uuid
from collections.abc import Callable, Mapping
from itertools import islice
from pathlib import Path
from typing import Any, BinaryIO

from adapterhub.errors import Conflict, Gone, NotFound
from adapterhub.manifest import FileEntry, Record
from adapterhub.refs import LATEST, AdapterName, AdapterRef, check_channel
from adapterhub.registry import entries, identity, layout, rules
from adapterhub.registry.base import (
    Changes,
    ChannelMove,
    Draft,
    Evaluation,
    Logs,
    Overview,
    Progress,
    Signature,
    Status,
    StatusChange,
    Target,
    Version,
)
from adapterhub.registry.changelog import ChangeLog
from adapterhub.registry.channels import check_weights, rollback_targets, standing
from adapterhub.registry.clock import now
from adapterhub.registry.lifecycle import tombstones
from adapterhub.registry.listing import Listing
from adapterhub.registry.logs import NumberedLog, status_changes
from adapterhub.registry.parallel import side_by_side
from adapterhub.registry.publishing import Publisher
from adapterhub.registry.records import Records, blob_key
from adapterhub.registry.store import Store, create_hint
from adapterhub.registry.transfer import Source, check, fetch, file_of


class ObjectRegistry:
    """A `base.Registry` over a `store.Store`."""

    def __init__(self, store: Store, *, wait: Callable[[float], None] = time.sleep) -> None:
        """``wait`` sleeps (seconds) between the attempts of publishers that collide."""
        self.store = store
        self._publisher = Publisher(store, wait=wait)
        self._records = Records(store)
        self._listing = Listing(store)
        self._log = ChangeLog(store)
        self._identity: identity.Identity | None = None  # what registry.json says, once it was read

    @property
    def url(self) -> str:
        return self.store.url

    def reach(self) -> None:
        self._open()

    def publish(
        self,
        draft: Draft,
        *,
        name: AdapterName,
        author: str,
        labels: Mapping[str, str] | None = None,
        number: int | None = None,
        progress: Progress | None = None,
    ) -> Record:
        self._open_for_writing()
        return self._publisher.publish(
            draft, name=name, author=author, labels=labels or {}, number=number, progress=progress
        )

    def _open_for_writing(self) -> None:
        """The first write of a registry: prove the store, then say what this is."""
        self._open()
        if self._identity is None:
            self._identity = identity.founded(self.store)

    def _open(self) -> None:
        """Raises Unsupported for a registry that a newer AdapterHub laid out. One that is not there yet is empty."""
        if self._identity is None:
            self._identity = identity.found(self.store)

    # ── read ─────────────────────────────────────────────────────────────────────────────────────────────────

    def resolve(self, ref: AdapterRef) -> Version:
        if ref.version is not None:
            return rules.usable(self.version(ref.name, ref.version), asked=str(ref))
        if ref.digest is not None:
            return self._with_digest(ref)
        if ref.channel == LATEST:
            return self._latest(ref.name)
        move = self._newest_move(ref.name, str(ref.channel))
        if move is None:
            self._require_adapter(ref.name)
            raise rules.no_channel(ref.name, str(ref.channel))
        return rules.usable(self.version(ref.name, move.main.version), asked=str(ref))

    def tenants(self) -> list[str]:
        self._open()
        gone = set(tombstones.all_of(self.store))  # one that is not cleared yet is gone all the same
        return [one for one in self.store.folders(layout.TENANTS) if one not in gone and self._has_adapters(one)]

    def adapters(self, tenant: str) -> list[AdapterName]:
        self._open()
        names = self._named(tenant)
        newest = side_by_side(self._records.newest_number, names)
        return [name for name, number in zip(names, newest, strict=True) if number]

    def _has_adapters(self, tenant: str) -> bool:
        """The first one with a version answers, mostly the very first: a folder can be what a killed publisher left."""
        first = [layout.adapter_in(tenant, key) for key in self.store.keys(layout.adapters(tenant), limit=1)]
        names = layout.adapter_names(tenant, first)
        if any(map(self._records.newest_number, names)):
            return True
        return bool(first) and any(self._records.newest_number(name) for name in self._named(tenant))

    def _named(self, tenant: str) -> list[AdapterName]:
        return layout.adapter_names(tenant, self.store.folders(layout.adapters(tenant)))

    def numbers(self, name: AdapterName) -> list[int]:
        self._require_adapter(name)
        return list(self._records.numbers(name))

    def version(self, name: AdapterName, number: int) -> Version:
        try:
            record = self._records.read(name, number)
        except NotFound:
            self._require_adapter(name)
            raise rules.no_version(name, number) from None
        return rules.with_status(record, self._newest_status(name, number))

    def versions(self, name: AdapterName, *, limit: int | None = None) -> list[Version]:
        self._require_adapter(name)
        statuses = self._statuses(name)
        return side_by_side(
            lambda n: rules.with_status(self._records.read(name, n), statuses.get(n)),
            islice(self._records.numbers(name), limit),
        )

    def overview(self, tenant: str) -> list[Overview]:
        self._open()
        return self._listing.overview(tenant)

    def reindex(self, tenant: str) -> int:
        """Write a new listing snapshot from everything that is there; returns the number of adapters."""
        self._open_for_writing()
        return self._listing.reindex(tenant)

    def fetch_file(self, record: Record, path: str, destination: Path, *, progress: Progress | None = None) -> None:
        entry = file_of(record, path)
        fetch(self._blob(record, entry), entry, destination, record=record, progress=progress)

    def check_file(self, record: Record, path: str) -> None:
        entry = file_of(record, path)
        check(self._blob(record, entry), entry, record=record)

    def _blob(self, record: Record, entry: FileEntry) -> Source:
        def opened(offset: int) -> BinaryIO:
            try:
                return self.store.open(blob_key(record, entry.sha256), offset=offset)
            except NotFound as error:
                raise NotFound(
                    f"the bytes of {entry.path} of {record.ref} are not in the registry",
                    why=error.what,
                    hint="publish the adapter again, or restore the registry from a copy",
                ) from error

        return opened

    # ── channels ─────────────────────────────────────────────────────────────────────────────────────────────

    def channels(self, name: AdapterName) -> dict[str, ChannelMove]:
        self._require_adapter(name)
        channels = self.store.folders(layout.channels(name))
        moves = side_by_side(lambda channel: self._newest_move(name, channel), channels)
        return {channel: move for channel, move in zip(channels, moves, strict=True) if move is not None}

    def channel_log(self, name: AdapterName, channel: str, *, limit: int | None = None) -> list[ChannelMove]:
        check_channel(channel)
        log = self._moves(name, channel).all(limit)
        if not log:
            self._require_adapter(name)
            raise rules.no_channel(name, channel)
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
        gates: Mapping[str, float] | None = None,
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
            move = ChannelMove(
                channel, seq + 1, chosen, "set", why, who, now(), op=uuid.uuid4().hex, gates=dict(gates or {})
            )
            if self._append(name, move):
                self._require_kept(name, move)
                return move
            if not force:
                raise self._moved(name, channel)

    def rollback(
        self,
        name: AdapterName,
        channel: str,
        *,
        to: int | None = None,
        who: str,
        why: str = "",
        expected: int | None = None,
    ) -> ChannelMove:
        while True:
            move = self._rolled_back(name, channel, to=to, who=who, why=why, expected=expected)
            try:
                self._require_kept(name, move)
            except Gone:
                if to is not None:
                    raise
                expected = move.seq  # yanked since it was chosen: the one before it, unless somebody else moves now
            else:
                return move

    def _rolled_back(
        self, name: AdapterName, channel: str, *, to: int | None, who: str, why: str, expected: int | None
    ) -> ChannelMove:
        log = self.channel_log(name, channel)
        if expected not in (None, log[0].seq):
            raise rules.moved(name, channel, log[0])
        targets: tuple[Target, ...]
        if to is not None:
            targets = (self._target(name, to, 100),)
        else:
            statuses = self._statuses(name)
            targets = rollback_targets(log, usable=lambda t: rules.status_of(statuses.get(t.version)) not in rules.GONE)
        seq, undoes = log[0].seq + 1, standing(log)[-1].seq
        move = ChannelMove(channel, seq, targets, "rollback", why, who, now(), op=uuid.uuid4().hex, undoes=undoes)
        if not self._append(name, move):
            raise self._moved(name, channel)
        return move

    def _require_kept(self, name: AdapterName, move: ChannelMove) -> None:
        """Whoever deletes versions by rule yanks, and then looks at the channels: one of us two sees the other."""
        for target in move.targets:
            status = rules.status_of(self._newest_status(name, target.version))
            if status in rules.GONE:
                raise Gone(
                    f"{name}@{target.version} was {status} while the channel {move.channel!r} moved to it",
                    why="the channel points at it now, and is refused",
                    hint=f"ah channel rollback {name} {move.channel}",
                )

    def _append(self, name: AdapterName, move: ChannelMove) -> bool:
        """Whether this move is now the log's entry of its number."""
        self._open()
        self._log.announce(name, f"channel {move.channel}")
        winner = self._moves(name, move.channel).append(move)
        return winner is None or winner.op == move.op  # the latter: the reply was lost, the move was not

    def _moved(self, name: AdapterName, channel: str) -> Conflict:
        return rules.moved(name, channel, self._newest_move(name, channel))

    def _target(self, name: AdapterName, version: int, weight: int) -> Target:
        found = rules.usable(self.version(name, version), asked=f"{name}@{version}")
        return Target(version, found.record.digest, weight)

    def _newest_move(self, name: AdapterName, channel: str) -> ChannelMove | None:
        return self._moves(name, channel).newest()

    def _moves(self, name: AdapterName, channel: str) -> NumberedLog[ChannelMove]:
        prefix = layout.moves(name, channel)
        return NumberedLog(self.store, prefix, read=entries.move_from_bytes, write=entries.move_to_bytes)

    # ── statuses ─────────────────────────────────────────────────────────────────────────────────────────────

    def set_status(self, name: AdapterName, version: int, status: Status, *, who: str, why: str = "") -> StatusChange:
        self._open()
        self.version(name, version)
        while True:
            current = self._newest_status(name, version)
            change = rules.next_status(name, version, current, status, who=who, why=why)
            if change is current:
                return current
            self._log.announce(name, f"status {version}")
            if self._status_changes(name, version).append(change) is None:
                return change  # else somebody changed it meanwhile: judge again

    def status_log(self, name: AdapterName, version: int) -> list[StatusChange]:
        self._require_version(name, version)
        return self._status_changes(name, version).all()

    def _newest_status(self, name: AdapterName, version: int) -> StatusChange | None:
        return self._status_changes(name, version).newest()

    def _status_changes(self, name: AdapterName, version: int) -> NumberedLog[StatusChange]:
        return status_changes(self.store, name, version)

    def _statuses(self, name: AdapterName) -> dict[int, StatusChange]:
        """The present status of each version that ever had one: most have none, so this is a short list."""
        numbers = [int(folder) for folder in self.store.folders(layout.statuses(name))]
        newest = side_by_side(lambda n: self._newest_status(name, n), numbers)
        return {n: change for n, change in zip(numbers, newest, strict=True) if change is not None}

    def delete_tenant(self, tenant: str, *, who: str, why: str = "") -> None:
        self._open()
        tombstones.bury(self.store, tenant, who=who, why=why)

    # ── evaluations and signatures ───────────────────────────────────────────────────────────────────────────

    def add_evaluation(
        self,
        name: AdapterName,
        version: int,
        *,
        suite: str,
        metrics: Mapping[str, float],
        details: Mapping[str, Any] | None = None,
        who: str,
    ) -> Evaluation:
        self._open()
        found = self.version(name, version)
        log = self._evaluations(name, version)
        while True:
            newest = log.newest()
            evaluation = rules.next_evaluation(
                found, newest.seq if newest else 0, suite=suite, metrics=metrics, details=details or {}, who=who
            )
            self._log.announce(name, f"evaluation {version}")
            winner = log.append(evaluation)
            # the latter: the reply was lost, the entry was not
            if winner is None or entries.evaluation_to_bytes(winner) == entries.evaluation_to_bytes(evaluation):
                return evaluation

    def evaluations(self, name: AdapterName, version: int) -> list[Evaluation]:
        self._require_version(name, version)
        return self._evaluations(name, version).all()

    def logs(self, name: AdapterName, *, limit: int | None = None) -> Logs:
        self._require_adapter(name)
        channels = self.store.folders(layout.channels(name))
        changed = [int(folder) for folder in self.store.folders(layout.statuses(name))]
        measured = [int(folder) for folder in self.store.folders(layout.measured(name))]
        return Logs(
            moves={channel: tuple(self._moves(name, channel).all(limit)) for channel in channels},
            statuses={n: tuple(self._status_changes(name, n).all(limit)) for n in sorted(changed)},
            evaluations={n: tuple(self._evaluations(name, n).all(limit)) for n in sorted(measured)},
        )

    def _evaluations(self, name: AdapterName, version: int) -> NumberedLog[Evaluation]:
        prefix = layout.evaluations(name, version)
        return NumberedLog(self.store, prefix, read=entries.evaluation_from_bytes, write=entries.evaluation_to_bytes)

    def add_signature(self, record: Record, signature: Signature) -> None:
        self._open()
        create_hint(self.store, layout.signature(record.name, record.digest, signature.key), signature.bundle)

    def signatures(self, record: Record) -> list[Signature]:
        keys = self.store.keys(layout.signatures(record.name, record.digest))
        return [Signature(layout.key_of(key), self.store.read(key)) for key in keys]

    # ── changes ──────────────────────────────────────────────────────────────────────────────────────────────

    def changes(self, tenant: str, cursor: str = "") -> Changes:
        return self._log.changes(tenant, cursor)

    # ── versions ─────────────────────────────────────────────────────────────────────────────────────────────

    def _latest(self, name: AdapterName) -> Version:
        for number in self._records.numbers(name):
            status = self._newest_status(name, number)
            if rules.status_of(status) == "active":
                return rules.with_status(self._records.read(name, number), status)
        self._require_adapter(name)
        raise rules.none_active(name)

    def _with_digest(self, ref: AdapterRef) -> Version:
        digest = str(ref.digest)
        found = []
        for number in self._records.hinted(ref.name, digest):
            try:
                version = self.version(ref.name, number)
            except NotFound:
                continue  # the hint of a publisher who came second, or was killed
            if version.record.digest == digest:
                found.append(version)
        if not found:
            self._require_adapter(ref.name)
            raise rules.no_version(ref.name, digest)
        return rules.first_usable(found, asked=str(ref))

    def _require_version(self, name: AdapterName, number: int) -> None:
        """Raises NotFound, without reading the record."""
        if not self.store.exists(layout.version(name, number)):
            self.version(name, number)  # says what is not there

    def _require_adapter(self, name: AdapterName) -> None:
        """Raises NotFound, and says whether it is the tenant or the adapter that is not there."""
        self._open()
        if self._records.newest_number(name):
            return
        if self._has_adapters(name.tenant):
            raise NotFound(f"there is no adapter {name} in {self.url}", hint=f"ah ls {name.tenant}")
        raise NotFound(f"there is no tenant {name.tenant!r} in {self.url}", hint="ah ls")
