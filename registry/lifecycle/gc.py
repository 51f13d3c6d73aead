"""Removes the bytes that no version needs, while others publish, without a lock and without trusting a clock.

    survey      the blobs, and what pins each: versions, publishes under way, youth
    condemn     tell publishers which blobs are about to go
    look again  publishes under way, then versions that came since: what either names stays
    delete      the rest; then close

In this order, either the collector sees the publish, or the publisher sees what is condemned and stores its bytes
beside (`condemned`); which of the two has the last word on a publish that takes long is settled in `intents`. All
interleavings are explored in tests/registry/test_gc_model.py; the argument is docs/decisions/0012.
"""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Protocol, runtime_checkable

from adapterhub.errors import NotFound, Unsupported
from adapterhub.manifest import Record
from adapterhub.refs import AdapterName
from adapterhub.registry import layout, rules
from adapterhub.registry.base import Registry
from adapterhub.registry.lifecycle import tombstones
from adapterhub.registry.lifecycle.condemned import LARGEST, QUARANTINE, Condemned
from adapterhub.registry.lifecycle.intents import Intent, Intents, UnderWay
from adapterhub.registry.logs import status_changes
from adapterhub.registry.objects import ObjectRegistry
from adapterhub.registry.parallel import side_by_side
from adapterhub.registry.records import Records, blob_key
from adapterhub.registry.store import Entry, Store


@dataclass(frozen=True)
class Patience:
    """How long a collector waits, in seconds. Only what it costs depends on these, never whether bytes are lost."""

    young: float = 24 * 3600  # a blob no older is left alone
    publish: float = 7 * 24 * 3600  # a publish that is under way for longer starts over
    hint: float = (
        7 * 24 * 3600
    )  # what happened longer ago goes from the change log: all have looked at everything since
    upload: float = 7 * 24 * 3600  # parts of an unfinished upload are removed after this
    closed: float = QUARANTINE


@dataclass(frozen=True)
class Blob:
    """One blob, and why it stays."""

    tenant: str
    key: str  # last part: sha256, perhaps with ~ and an epoch
    size: int  # bytes
    pinned_by: tuple[str, ...]  # "acme/support@3", "a publish of acme/bot by ana since …"; none: it goes


@dataclass
class Report:
    """What a collection found and did; of a dry run, what it would have done."""

    blobs: list[Blob] = field(default_factory=list)
    freed: int = 0  # blobs
    freed_size: int = 0  # bytes
    unfinished: int = 0  # uploads and temporary files of killed writers, removed
    forgotten: int = 0  # publishes that are not waited for any more
    hints: int = 0  # of the change log, removed
    notes: list[str] = field(default_factory=list)  # what somebody should look at


def collect(
    registry: Registry,
    tenants: Iterable[str] | None = None,
    *,
    dry_run: bool = False,
    patience: Patience | None = None,
    forget: str = "",
) -> Report:
    """Free what nothing pins, of these tenants or of all, and of tenants that were deleted.

    ``forget`` is the id of a publish whose machine is known to be dead, and which is not waited for any more.

    Raises:
        Unsupported: a kind of registry that cannot be collected, or keeps no intents that could be forgotten.
        NotFound: a tenant, or the publish to forget, that is not there.
        IntegrityError: a record or an intent that cannot be read; nothing of its tenant is deleted then.
    """
    if not isinstance(registry, ObjectRegistry):
        return _sweep(registry, tenants, dry_run=dry_run, forget=forget)
    patience, store = patience or Patience(), registry.store
    known = sorted({*store.folders(layout.TENANTS), *tombstones.all_of(store)})
    wanted = known if tenants is None else list(tenants)
    report = Report()
    for tenant in wanted:
        if tenant not in known:
            raise NotFound(f"there is no tenant {tenant!r} in {registry.url}", hint="ah ls")
        if not tombstones.is_gone(store, tenant):
            _Tenant(store, tenant, patience, report).collect(dry_run=dry_run, forget=forget)
        elif not dry_run:
            tombstones.clear(store, tenant)
    if forget and not report.forgotten:
        raise NotFound(f"no publish {forget!a} is under way", hint="ah gc --dry-run names those that are waited for")
    report.unfinished = store.sweep(older_than=patience.upload, dry_run=dry_run)
    report.blobs.sort(key=lambda blob: (bool(blob.pinned_by), blob.tenant, -blob.size))
    return report


@runtime_checkable
class Swept(Protocol):
    """A registry whose bytes are kept by somebody else: only what killed publishes left goes."""

    def sweep(self, tenants: Collection[str] | None = None, *, dry_run: bool = False) -> int:
        """How many unfinished publishes were removed, or would be."""


def _sweep(registry: Registry, tenants: Iterable[str] | None, *, dry_run: bool, forget: str) -> Report:
    if not isinstance(registry, Swept) or forget:
        raise Unsupported(
            f"{registry.url} waits for no publish" if forget else f"{registry.url} cannot be collected",
            why="what a killed publish left on the Hub goes after a week",
            hint="ah gc",
        )
    unfinished = registry.sweep(None if tenants is None else list(tenants), dry_run=dry_run)
    kept = (
        "the Hub keeps the bytes of deleted versions in the history of each repository; "
        "`ah delete-tenant` removes whole repositories"
    )
    return Report(unfinished=unfinished, notes=[kept])


class _Tenant:
    """One tenant's collection."""

    def __init__(self, store: Store, tenant: str, patience: Patience, report: Report) -> None:
        self._store = store
        self._tenant = tenant
        self._patience = patience
        self._report = report
        self._intents = Intents(store)
        self._condemned = Condemned(store)
        self._records = Records(store)
        self._versions = _Versions(store, tenant)

    def collect(self, *, dry_run: bool, forget: str) -> None:
        garbage = self._survey(forget)
        self._prune_changes(dry_run=dry_run)
        if dry_run:
            self._report.freed += len(garbage)
            self._report.freed_size += sum(entry.size for entry in garbage)
            return
        for start in range(0, len(garbage), LARGEST):
            self._free(garbage[start : start + LARGEST], forget)
        if not garbage:
            self._publishes(forget, ask=True)  # leaves no intent of a dead publish behind
        self._condemned.remove_closed(self._tenant, older_than=self._patience.closed)
        self._intents.remove_idle_doubts(self._tenant)

    def _prune_changes(self, *, dry_run: bool) -> None:
        horizon = layout.events_at(self._tenant, int((time.time() - self._patience.hint) * 1000))
        old = self._store.keys(layout.events(self._tenant), after=horizon)
        self._report.hints += len(old)
        if old and not dry_run:
            self._store.delete(*old)

    def _survey(self, forget: str) -> list[Entry]:
        """What nothing pins. Blobs are listed first: what is stored later is not judged."""
        entries = list(self._store.entries(layout.blobs(self._tenant)))
        publishes = self._publishes(forget, ask=False)
        self._versions.read_new()
        garbage = []
        for entry in entries:
            pins = tuple(self._pins(entry, publishes))
            self._report.blobs.append(Blob(self._tenant, entry.key.rpartition("/")[2], entry.size, pins))
            if not pins:
                garbage.append(entry)
        return garbage

    def _pins(self, entry: Entry, publishes: Sequence[Intent]) -> Iterator[str]:
        yield from self._versions.naming(entry.key)
        sha256, _ = layout.blob_of(entry.key)
        for intent in publishes:
            if sha256 in intent.digests:
                yield f"a publish of {intent.name} by {intent.who} since {intent.when}"
        if time.time() - entry.modified < self._patience.young:
            yield f"stored less than {self._patience.young / 3600:g} hours ago"

    def _free(self, garbage: Sequence[Entry], forget: str) -> None:
        """The order of the steps is the whole point: see the top of this file."""
        collection = self._condemned.begin(self._tenant, [layout.blob_of(entry.key) for entry in garbage])
        publishes = self._publishes(forget, ask=True)
        self._versions.read_new()
        named = {sha256 for intent in publishes for sha256 in intent.digests}
        free = [e for e in garbage if layout.blob_of(e.key)[0] not in named and not self._versions.naming(e.key)]
        if free:
            self._store.delete(*(entry.key for entry in free))
        self._condemned.close(self._tenant, collection)
        self._report.freed += len(free)
        self._report.freed_size += sum(entry.size for entry in free)

    def _publishes(self, forget: str, *, ask: bool) -> list[Intent]:
        """The publishes that may still commit. With ``ask``, those that take too long are given up, if they can be."""
        pinning = []
        for one in self._intents.under_way(self._tenant):
            age = time.time() - one.modified
            if one.intent.id == forget:
                self._report.forgotten = 1
                if ask:
                    self._intents.end(one.intent)
            elif one.seal == "commits":
                pinning += self._committing(one, age, ask=ask)
            elif one.seal == "given up" or age > self._patience.publish:
                if ask and not self._intents.give_up(one.intent):
                    pinning.append(one.intent)
                elif ask:
                    self._intents.forget_given_up(one.intent)
            else:
                pinning.append(one.intent)
        return pinning

    def _committing(self, one: UnderWay, age: float, *, ask: bool) -> list[Intent]:
        """It may have its record by now: then only its last step is missing. Or it never will (`intents`)."""
        intent = one.intent
        if age <= self._patience.publish:
            return [intent]
        self._versions.read_new()
        if intent.id in self._versions.publish_ids:
            if ask:
                self._intents.end(intent)
            return []
        if one.past is not None and self._versions.has_all(intent.name, one.past, wanted=intent.number):
            if ask:
                self._intents.forget_given_up(intent)
            return []
        if ask and intent.asks:
            self._intents.doubt(intent, newest=lambda: self._records.newest_number(intent.name))
        if not ask:
            self._report.notes.append(
                f"a publish of {intent.name} by {intent.who} was about to commit on {intent.when} and never said "
                f"how it ended; its bytes stay until {intent.name} has its next version. If its machine is dead: "
                f"ah gc --forget {intent.id}"
            )
        return [intent]


class _Versions:
    """What the versions of a tenant name. Records never change, so each is read once."""

    def __init__(self, store: Store, tenant: str) -> None:
        self._store = store
        self._tenant = tenant
        self._records = Records(store)
        self._known: set[tuple[AdapterName, int]] = set()
        self._naming: dict[str, list[str]] = defaultdict(list)
        self.publish_ids: set[str] = set()

    def naming(self, key: str) -> Sequence[str]:
        """The versions that are not deleted and have their bytes at this key."""
        return self._naming.get(key, ())

    def has_all(self, name: AdapterName, newest: int, *, wanted: int | None) -> bool:
        """Whether each number is taken that a publisher may have been about to try when ``newest`` was the newest."""
        numbers = range(1, newest + 2) if wanted is None else [wanted]
        return all((name, number) in self._known for number in numbers)

    def read_new(self) -> None:
        """All versions that were not read yet, of whatever adapter."""
        names = [AdapterName(self._tenant, one) for one in self._store.folders(layout.adapters(self._tenant))]
        new = [(name, n) for name in names for n in self._records.numbers(name) if (name, n) not in self._known]
        changed = {
            (name, int(n)) for name in {name for name, _ in new} for n in self._store.folders(layout.statuses(name))
        }
        for record, deleted in side_by_side(lambda one: self._read(*one, changed=one in changed), new):
            self._add(record, deleted)
        self._known.update(new)

    def _read(self, name: AdapterName, number: int, *, changed: bool) -> tuple[Record, bool]:
        """A record, and whether it is deleted; ``changed``: whether it ever had a status."""
        log = status_changes(self._store, name, number)
        return self._records.read(name, number), changed and rules.status_of(log.newest()) == "deleted"

    def _add(self, record: Record, deleted: bool) -> None:
        self.publish_ids.add(record.publish_id)
        if not deleted:
            for sha256 in {file.sha256 for file in record.manifest.files}:
                self._naming[blob_key(record, sha256)].append(str(record.ref))
