"""The Registry on the Hugging Face Hub: one private model repository an adapter (`layout` draws it).

    looking         hubreader     what is there at one moment, read once
    publishing      hubpublish    a commit beside, then the tag v<n>: 409 where it is taken
    logs            hublog        one JSON file on the branch ah-channels, changed by compare and swap
    asking          hubclient     huggingface_hub, retries; huberrors wraps what it raises

A change is judged by what is there now, and judged anew where somebody else was first.
"""

from __future__ import annotations

import random
import time
import uuid
from collections.abc import Callable, Collection, Mapping
from pathlib import Path
from typing import Any, TypeVar

from adapterhub.errors import Conflict, NotFound
from adapterhub.manifest import FORMAT, FileEntry, Record, canonical_json, parse_json
from adapterhub.refs import LATEST, AdapterName, AdapterRef, check_channel
from adapterhub.registry import rules
from adapterhub.registry.base import (
    Changes,
    ChannelMove,
    Draft,
    Evaluation,
    Event,
    Logs,
    Overview,
    Progress,
    Signature,
    Status,
    StatusChange,
    Target,
    Version,
)
from adapterhub.registry.channels import check_weights, rollback_targets, standing
from adapterhub.registry.clock import now
from adapterhub.registry.hub import layout
from adapterhub.registry.hub.client import Hub
from adapterhub.registry.hub.errors import Busy, Stale
from adapterhub.registry.hub.log import Log, log_to_bytes
from adapterhub.registry.hub.publish import HubPublisher
from adapterhub.registry.hub.reader import HubReader
from adapterhub.registry.hub.state import State, events_of, logs_of, moves_of, status_of
from adapterhub.registry.parallel import side_by_side
from adapterhub.registry.transfer import Source, check, fetch, file_of

T = TypeVar("T")

_TRIES = 40  # of one change to a log: each lost one means that somebody else's went in


class HubRegistry:
    """A `base.Registry` over the model repositories of one organisation or user."""

    def __init__(
        self,
        org: str,
        *,
        endpoint: str | None = None,
        token: str | None = None,
        wait: Callable[[float], None] = time.sleep,
    ) -> None:
        """``endpoint`` and ``token`` default to the usual ones of the Hub (``HF_ENDPOINT``, ``HF_TOKEN``)."""
        self._hub = Hub(org, endpoint=endpoint, token=token, wait=wait)
        self._publisher = HubPublisher(self._hub)
        self._look = HubReader(self._hub)

    @property
    def url(self) -> str:
        return self._look.url

    def reach(self) -> None:
        self._hub.connect()

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
        return self._publisher.publish(
            draft, name=name, author=author, labels=labels or {}, number=number, progress=progress
        )

    def sweep(self, tenants: Collection[str] | None = None, *, dry_run: bool = False) -> int:
        """Remove the branches that publishes left which were killed more than a week ago; how many there were.

        Raises NotFound for a tenant without a repository.
        """
        names = self._look.names()
        known = {name.tenant for name in names}
        if strange := [tenant for tenant in tenants or () if tenant not in known]:
            raise NotFound(f"there is no tenant {strange[0]!r} in {self.url}", hint="ah ls")
        chosen = [name for name in names if tenants is None or name.tenant in tenants]
        return sum(side_by_side(lambda name: self._publisher.sweep(name, dry_run=dry_run), chosen))

    # ── read ─────────────────────────────────────────────────────────────────────────────────────────────────

    def resolve(self, ref: AdapterRef) -> Version:
        state = self._look.state(ref.name)
        if ref.digest is not None:
            return self._with_digest(ref, state)
        if ref.version is not None:
            number = ref.version
        elif ref.channel == LATEST:
            number = rules.latest(ref.name, state.numbers, lambda n: rules.status_of(state.log.newest_status(n)))
        else:
            move = state.log.newest_move(str(ref.channel))
            if move is None:
                raise rules.no_channel(ref.name, str(ref.channel))
            number = move.main.version
        version = self._look.version(ref.name, number, state)
        return rules.usable(version, asked=str(ref)) if ref.channel != LATEST else version

    def _with_digest(self, ref: AdapterRef, state: State) -> Version:
        found = [version for version in self._look.versions(ref.name, state) if version.record.digest == ref.digest]
        if not found:
            raise rules.no_version(ref.name, str(ref.digest))
        return rules.first_usable(found, asked=str(ref))

    def tenants(self) -> list[str]:
        return sorted({name.tenant for name in self._look.published(self._look.names())})

    def adapters(self, tenant: str) -> list[AdapterName]:
        return sorted(self._look.published(name for name in self._look.names() if name.tenant == tenant))

    def numbers(self, name: AdapterName) -> list[int]:
        return list(self._look.numbered(name, self._look.refs(name)))

    def version(self, name: AdapterName, number: int) -> Version:
        return self._look.version(name, number, self._look.state(name))

    def versions(self, name: AdapterName, *, limit: int | None = None) -> list[Version]:
        return self._look.versions(name, self._look.state(name), limit)

    def logs(self, name: AdapterName, *, limit: int | None = None) -> Logs:
        return logs_of(self._look.state(name).log, limit)

    def overview(self, tenant: str) -> list[Overview]:
        return side_by_side(self._overview, self.adapters(tenant))

    def _overview(self, name: AdapterName) -> Overview:
        state = self._look.state(name)
        return Overview(
            name=name,
            versions=tuple(
                rules.summary(version, state.log.evaluations.get(version.record.version, ()))
                for version in self._look.versions(name, state)
            ),
            channels={channel: moves[0].targets for channel, moves in sorted(state.log.moves.items())},
        )

    def fetch_file(self, record: Record, path: str, destination: Path, *, progress: Progress | None = None) -> None:
        entry = file_of(record, path)
        fetch(self._source(record, entry), entry, destination, record=record, progress=progress)

    def check_file(self, record: Record, path: str) -> None:
        entry = file_of(record, path)
        check(self._source(record, entry), entry, record=record)

    def _source(self, record: Record, entry: FileEntry) -> Source:
        repo = layout.repository(self._hub.org, record.name)

        def opened(offset: int) -> Any:
            try:
                return self._hub.open(repo, layout.place(entry.path), layout.tag(record.version), offset)
            except NotFound as error:
                raise NotFound(
                    f"the bytes of {entry.path} of {record.ref} are not in {self.url}",
                    why=error.why or error.what,
                    hint="publish the adapter again, or copy it from another registry: ah copy",
                ) from error

        return opened

    # ── channels ─────────────────────────────────────────────────────────────────────────────────────────────

    def channels(self, name: AdapterName) -> dict[str, ChannelMove]:
        return {channel: moves[0] for channel, moves in sorted(self._look.state(name).log.moves.items())}

    def channel_log(self, name: AdapterName, channel: str, *, limit: int | None = None) -> list[ChannelMove]:
        check_channel(channel)
        return list(moves_of(name, channel, self._look.state(name).log)[:limit])

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
        state = self._look.state(name)
        first = state.log.newest_move(channel)
        known = expected if expected is not None else first.seq if first else 0
        op = uuid.uuid4().hex

        def step(now_: State) -> tuple[Log, ChannelMove]:
            current = now_.log.newest_move(channel)
            seq = current.seq if current else 0
            if seq != known and not force:
                raise rules.moved(name, channel, current)
            chosen = tuple(self._target(name, v, weight, now_) for v, weight in sorted(targets.items()))
            move = ChannelMove(channel, seq + 1, chosen, "set", why, who, now(), op=op, gates=dict(gates or {}))
            return now_.log.with_move(move), move

        return self._change(name, op, step, state)

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
        check_channel(channel)
        state = self._look.state(name)
        known = expected if expected is not None else moves_of(name, channel, state.log)[0].seq
        op = uuid.uuid4().hex

        def step(now_: State) -> tuple[Log, ChannelMove]:
            moves = moves_of(name, channel, now_.log)
            if moves[0].seq != known:
                raise rules.moved(name, channel, moves[0])
            targets = (
                (self._target(name, to, 100, now_),)
                if to is not None
                else rollback_targets(moves, usable=lambda t: status_of(now_.log, t.version) not in rules.GONE)
            )
            undoes = standing(moves)[-1].seq
            move = ChannelMove(channel, known + 1, targets, "rollback", why, who, now(), op=op, undoes=undoes)
            return now_.log.with_move(move), move

        return self._change(name, op, step, state)

    def _target(self, name: AdapterName, number: int, weight: int, state: State) -> Target:
        found = rules.usable(self._look.version(name, number, state), asked=f"{name}@{number}")
        return Target(number, found.record.digest, weight)

    # ── statuses, evaluations, signatures ────────────────────────────────────────────────────────────────────

    def set_status(self, name: AdapterName, version: int, status: Status, *, who: str, why: str = "") -> StatusChange:
        op = uuid.uuid4().hex

        def step(state: State) -> tuple[Log, StatusChange]:
            self._look.version(name, version, state)
            current = state.log.newest_status(version)
            change = rules.next_status(name, version, current, status, who=who, why=why)
            return state.log if change is current else state.log.with_status(version, change, op=op), change

        return self._change(name, op, step, self._look.state(name))

    def status_log(self, name: AdapterName, version: int) -> list[StatusChange]:
        return list(self._having(name, version).log.statuses.get(version, ()))

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
        op = uuid.uuid4().hex

        def step(state: State) -> tuple[Log, Evaluation]:
            evaluation = rules.next_evaluation(
                self._look.version(name, version, state),
                len(state.log.evaluations.get(version, ())),
                suite=suite,
                metrics=metrics,
                details=details or {},
                who=who,
            )
            return state.log.with_evaluation(version, evaluation, op=op), evaluation

        return self._change(name, op, step, self._look.state(name))

    def evaluations(self, name: AdapterName, version: int) -> list[Evaluation]:
        return list(self._having(name, version).log.evaluations.get(version, ()))

    def add_signature(self, record: Record, signature: Signature) -> None:
        op = uuid.uuid4().hex
        self._change(
            record.name,
            op,
            lambda state: (state.log.with_signature(record.digest, signature, op=op), None),
            self._look.state(record.name),
        )

    def signatures(self, record: Record) -> list[Signature]:
        there = self._look.state(record.name).log.signatures.get(record.digest, {})
        return [Signature(key, bundle) for key, bundle in sorted(there.items())]

    def _having(self, name: AdapterName, number: int) -> State:
        """Raises NotFound where the adapter has no such version; its record is not read."""
        state = self._look.state(name)
        if number not in state.numbers:
            raise rules.no_version(name, number)
        return state

    # ── changes ──────────────────────────────────────────────────────────────────────────────────────────────

    def changes(self, tenant: str, cursor: str = "") -> Changes:
        """As `base.Registry.changes`, exact where others only hint: the refs of each adapter, side by side.

        A cursor tells of each adapter its newest version and the length of its log.
        """
        states = dict(side_by_side(lambda name: (name, self._look.state(name)), self.adapters(tenant)))
        seen: dict[str, list[int]] | None = parse_json(cursor.encode(), what="a cursor") if cursor else None
        position = {name.adapter: [max(s.numbers), len(s.log.done)] for name, s in states.items()}
        events: list[Event] = []
        for name, state in states.items() if seen is not None else ():
            events += events_of(name, state, (seen or {}).get(name.adapter))
        return Changes(tuple(events), canonical_json(position).decode())

    # ── tenants ──────────────────────────────────────────────────────────────────────────────────────────────

    def delete_tenant(self, tenant: str, *, who: str, why: str = "") -> None:
        repos = [layout.repository(self._hub.org, name) for name in self._look.names() if name.tenant == tenant]
        gone = self._publisher.is_gone(tenant)
        if not repos and not gone:
            raise NotFound(f"there is no tenant {tenant!r} in {self.url}", hint="ah ls")
        if not gone:
            self._bury(tenant, who=who, why=why)
        for repo in repos:
            self._hub.delete_repository(repo)

    def _bury(self, tenant: str, *, who: str, why: str) -> None:
        """Write the tombstone, so that the name is never issued again."""
        book = f"{self._hub.org}/{layout.BOOK}"
        self._hub.create_repository(book)
        stone = canonical_json({"format": FORMAT, "tenant": tenant, "who": who, "why": why, "when": now()})
        for attempt in range(_TRIES):
            head = self._hub.refs(book).branches[layout.MAIN]
            try:
                self._hub.commit(
                    book, layout.MAIN, parent=head, message=f"Delete {tenant}", add={layout.gone(tenant): stone}
                )
                return
            except (Busy, Stale):
                self._pause(attempt)
                if self._publisher.is_gone(tenant):
                    return
        raise _crowded(book)

    # ── compare and swap ─────────────────────────────────────────────────────────────────────────────────────

    def _change(self, name: AdapterName, op: str, step: Callable[[State], tuple[Log, T]], state: State) -> T:
        """Put ``step(state)`` in the place of the log that it was made from; again where somebody was first.

        ``step`` judges each time anew, and raises what its caller is told. ``op`` in the log means that it is done.
        """
        repo = layout.repository(self._hub.org, name)
        result: T | None = None
        for attempt in range(_TRIES):
            if attempt and state.log.has(op):
                return result  # type: ignore[return-value]  # of the try whose reply was lost
            log, result = step(state)
            if log is state.log:
                return result
            try:
                self._hub.commit(
                    repo,
                    layout.LOG_BRANCH,
                    parent=state.log_head,
                    message=log.done[-1].what,
                    add={layout.LOG: log_to_bytes(log)},
                )
            except (Busy, Stale):
                self._pause(attempt)
                state = self._look.state(name)
            else:
                return result
        raise _crowded(repo)

    def _pause(self, attempt: int) -> None:
        self._hub.wait(random.uniform(0, min(2.0, 0.05 * 2**attempt)))  # noqa: S311 - jitter


def _crowded(repo: str) -> Conflict:
    return Conflict(
        f"{repo} is changed by too many at once",
        why=f"{_TRIES} tries in a row found that somebody else was first",
        hint="type the same command again",
    )
