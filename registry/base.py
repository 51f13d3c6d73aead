"""The Registry protocol: what a registry promises, whatever it is built on.

`objects.ObjectRegistry` keeps these promises over any `store.Store`; a Hub of model repositories keeps them its own
way. Callers (the CLI, the server) know this file only.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, Protocol

from adapterhub.manifest import Manifest, Record, Verdicts
from adapterhub.refs import LATEST, AdapterName, AdapterRef
from adapterhub.runrecord import RunRecord

Status = Literal["active", "deprecated", "yanked", "deleted"]
Progress = Callable[[int], None]  # told the bytes of each step that is done: stored, or found stored already


@dataclass(frozen=True)
class Draft:
    """A validated adapter directory, ready to be published: what `drafts.draft` makes of a folder."""

    path: Path
    manifest: Manifest
    verdicts: Verdicts
    replaced: Mapping[str, bytes] = field(default_factory=dict)  # published instead of the file of that name
    run: RunRecord | None = None  # of the training that made it, where it left one
    notes: tuple[str, ...] = ()  # for people: what was found and is no error


@dataclass(frozen=True)
class StatusChange:
    """One entry of a version's status log."""

    seq: int
    status: Status
    why: str
    who: str
    when: str  # ISO 8601, UTC


@dataclass(frozen=True)
class Version:
    """A record and its present status."""

    record: Record
    status: Status = "active"
    why: str = ""  # of the status


@dataclass(frozen=True)
class Target:
    """Where a channel points: a version, and its share of the callers (weights of one move sum to 100)."""

    version: int
    digest: str
    weight: int = 100  # percent


@dataclass(frozen=True)
class ChannelMove:
    """One entry of a channel's log; the newest is where the channel points."""

    channel: str
    seq: int
    targets: tuple[Target, ...]
    kind: Literal["set", "rollback"]
    why: str
    who: str
    when: str  # ISO 8601, UTC
    op: str  # id of the operation: a mover whose reply was lost knows its own move by it
    undoes: int | None = None  # a rollback: seq of the deployment that it went back from
    gates: Mapping[str, float] = field(default_factory=dict)  # when servers may roll it back (`rollouts.Gates`)

    @property
    def main(self) -> Target:
        """The target with the largest weight."""
        return max(self.targets, key=lambda t: t.weight)


@dataclass(frozen=True)
class Evaluation:
    """One entry of a version's log of evaluations: what was measured of it after it was published."""

    seq: int
    suite: str  # what was run: "gsm8k", "support-heldout"
    metrics: Mapping[str, float]
    details: Mapping[str, Any]  # JSON: settings, data hashes, the other side of a comparison
    who: str
    when: str  # ISO 8601, UTC


@dataclass(frozen=True)
class Summary:
    """One version as lists and searches show it."""

    name: AdapterName
    version: int
    digest: str
    status: Status
    created: str  # ISO 8601, UTC
    author: str
    size: int  # bytes of all files
    rank: int
    base: str  # its name; empty where unknown
    method: str  # "sft", "dpo", …; empty where unknown
    parents: tuple[str, ...]  # digests
    labels: Mapping[str, str]
    metrics: Mapping[str, float]  # of the training
    evaluations: Mapping[str, Mapping[str, float]] = field(default_factory=dict)  # suite → metrics, the newest of each


@dataclass(frozen=True)
class Overview:
    """One adapter as lists show it."""

    name: AdapterName
    versions: tuple[Summary, ...]  # newest first, tombstones included
    channels: Mapping[str, tuple[Target, ...]]


@dataclass(frozen=True)
class Logs:
    """All that happened to an adapter's versions after they were published; each log newest first."""

    moves: Mapping[str, tuple[ChannelMove, ...]] = field(default_factory=dict)  # by channel
    statuses: Mapping[int, tuple[StatusChange, ...]] = field(default_factory=dict)  # by version
    evaluations: Mapping[int, tuple[Evaluation, ...]] = field(default_factory=dict)  # by version


@dataclass(frozen=True)
class Signature:
    """Somebody's signature over a version's digest, as a sigstore bundle."""

    key: str  # id of the public key that verifies it
    bundle: bytes


@dataclass(frozen=True)
class Event:
    """A hint in a tenant's change log: something may have happened to this adapter. Read the adapter to know."""

    key: str  # sorts newest first
    adapter: AdapterName
    what: str  # "publish", "channel prod", "status 3", "evaluation 3"
    when: str

    def concerns(self, ref: AdapterRef) -> bool:
        """Whether what ``ref`` resolves to may be another version now, or have another status."""
        kind, _, which = self.what.partition(" ")
        if self.adapter != ref.name or kind in {"evaluation", "signature"}:
            return False
        if kind == "channel":
            return ref.channel == which
        if kind == "publish":
            return ref.channel == LATEST or ref.digest is not None  # the same bytes again, after a yank
        return True


@dataclass(frozen=True)
class Changes:
    """What `Registry.changes` found: the events newer than the cursor, and the cursor to hand in next time."""

    events: Sequence[Event] = field(default_factory=tuple)
    cursor: str = ""


class Registry(Protocol):
    """Immutable versions, movable channels.

    Concurrency: any number of processes on any machines may call any method at once. A version is visible whole or
    not at all; numbers are contiguous and never reused; a channel move is never lost.

    Every method may raise StorageError (store away, disk full) and IntegrityError (a record that is not its digest).
    """

    @property
    def url(self) -> str:
        """``file:///…``, ``memory://``, ``s3://bucket/prefix``: opens the same registry again."""

    def reach(self) -> None:
        """Connect now, and see that this version knows the registry: else the first request does it.

        Raises Unsupported for a registry that a newer AdapterHub laid out.
        """

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
        """Make a draft the next version of ``name``. Returns when it is durable and visible.

        ``number`` asks for that number and no other (a copy that keeps its own): Conflict where it is taken or
        below the newest.

        The draft's files are hashed again while they are copied: a file that changed since `draft` read it raises
        AdapterError, and nothing becomes visible. Publishing the same content again makes a new version with the
        same digest and sends no bytes.
        """

    def resolve(self, ref: AdapterRef) -> Version:
        """The version that a reference names now.

        A channel with several targets resolves to its main one. Raises NotFound for what is not there, Gone for a
        yanked or deleted version (also through a channel, also by digest when no other version has it).
        """

    def tenants(self) -> list[str]:
        """Tenants with at least one version, sorted."""

    def adapters(self, tenant: str) -> list[AdapterName]:
        """Adapters of a tenant with at least one version, sorted."""

    def numbers(self, name: AdapterName) -> list[int]:
        """Numbers of all versions, newest first, tombstones included; no record is read. Raises NotFound."""

    def version(self, name: AdapterName, number: int) -> Version:
        """One version whatever its status, unlike `resolve`. Raises NotFound, IntegrityError."""

    def versions(self, name: AdapterName, *, limit: int | None = None) -> list[Version]:
        """All versions, or the newest ``limit``, with their status, newest first, tombstones included.

        Raises NotFound.
        """

    def channels(self, name: AdapterName) -> dict[str, ChannelMove]:
        """Each channel's newest move, sorted by channel. ``latest`` is computed and not among them."""

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
        """Point a channel at version → weight (percent, summing to 100). ``gates`` are kept with the move.

        ``expected`` is the ``seq`` that the caller read (0: no move yet); when left out, it is read here. Raises
        Conflict when somebody moved it meanwhile (``force`` then moves it again), NotFound for a version that is not
        there, Gone for a yanked or deleted one.
        """

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
        """Point a channel back at the deployment before the current one, or at version ``to``.

        Steps over earlier rollbacks and over yanked versions, so two rollbacks in a row go back two deployments.
        ``expected`` is as for `set_channel`. Raises NotFound when nothing is left to go back to, Conflict.
        """

    def channel_log(self, name: AdapterName, channel: str, *, limit: int | None = None) -> list[ChannelMove]:
        """All moves of a channel, or the newest ``limit``, newest first. Raises NotFound."""

    def set_status(self, name: AdapterName, version: int, status: Status, *, who: str, why: str = "") -> StatusChange:
        """Yank, deprecate, delete, or make active again. Deleted is final: Gone for any later change."""

    def status_log(self, name: AdapterName, version: int) -> list[StatusChange]:
        """All changes of a version's status, newest first; empty for one that was always active."""

    def logs(self, name: AdapterName, *, limit: int | None = None) -> Logs:
        """Moves, statuses and evaluations, all or the newest ``limit`` of each log. Raises NotFound."""

    def overview(self, tenant: str) -> list[Overview]:
        """All adapters of a tenant with their versions and channels, sorted by name: a few requests, however many.

        As fresh as `versions`: what was published before the call is told.
        """

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
        """Add what was measured of a version. Raises NotFound, Gone for a deleted one."""

    def evaluations(self, name: AdapterName, version: int) -> list[Evaluation]:
        """All evaluations of a version, newest first."""

    def add_signature(self, record: Record, signature: Signature) -> None:
        """Store a signature over the record's digest. One of the same key that is there stays as it is."""

    def signatures(self, record: Record) -> list[Signature]:
        """All signatures over the record's digest, sorted by key. Nobody has verified them yet."""

    def fetch_file(self, record: Record, path: str, destination: Path, *, progress: Progress | None = None) -> None:
        """Write one file of a version to ``destination`` and fsync it. Verifies size and sha256.

        What is at ``destination`` already is taken for the start of the file, left by a fetch that was killed, and
        not transferred again. Raises IntegrityError for a wrong byte, NotFound for a blob that is gone; then the
        file is removed. After a StorageError it stays, for the next try.
        """

    def check_file(self, record: Record, path: str) -> None:
        """Read one file of a version to its end and keep nothing of it. Raises as `fetch_file`."""

    def delete_tenant(self, tenant: str, *, who: str, why: str = "") -> None:
        """Remove all that a tenant has, at once and for ever, but for a tombstone: its name is never issued again.

        Can be called again to finish what was broken off. Raises NotFound for a tenant that never was.
        """

    def changes(self, tenant: str, cursor: str = "") -> Changes:
        """What may have happened under a tenant since ``cursor``, newest first: one LIST.

        A cursor is taken before the first full look; without one, only the last seconds are told. Events of the last
        10 s come again in the next call, because a hint is written before its commit. They can also be lost: look
        at everything once in a while.
        """
