"""What happened to an adapter on the Hub after its versions were published: one JSON file, changed as a whole. No I/O.

    {"format": 1,
     "channels":    {"prod": [move, …]},            newest first, as are all lists but the last
     "statuses":    {"3": [change, …]},
     "evaluations": {"3": [evaluation, …]},
     "signatures":  {"sha256:9f…": {"<key>": "<base64>"}},
     "done":        [{"op": …, "what": …, "when": …}, …]}       oldest first

Each change adds to ``done`` under an id of its own: a writer whose reply was lost finds it there, and no commit is
empty (the client skips such a commit, and with it the check of the parent).
"""

from __future__ import annotations

import base64
import binascii
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any, TypeVar

from adapterhub.errors import IntegrityError
from adapterhub.manifest import FORMAT, Json, canonical_json, parse_json
from adapterhub.registry import entries
from adapterhub.registry.base import ChannelMove, Evaluation, Signature, StatusChange
from adapterhub.registry.clock import now
from adapterhub.registry.logs import Numbered, Read

_LIMIT = 64 * 2**20  # bytes
T = TypeVar("T", bound=Numbered)


@dataclass(frozen=True)
class Done:
    """One change of the log."""

    op: str
    what: str  # "channel prod", "status 3"
    when: str  # ISO 8601, UTC


@dataclass(frozen=True)
class Log:
    """Lists are newest first; ``done`` oldest first."""

    moves: Mapping[str, tuple[ChannelMove, ...]] = field(default_factory=dict)
    statuses: Mapping[int, tuple[StatusChange, ...]] = field(default_factory=dict)
    evaluations: Mapping[int, tuple[Evaluation, ...]] = field(default_factory=dict)
    signatures: Mapping[str, Mapping[str, bytes]] = field(default_factory=dict)
    done: tuple[Done, ...] = ()

    def newest_move(self, channel: str) -> ChannelMove | None:
        return self.moves.get(channel, (None,))[0]

    def newest_status(self, version: int) -> StatusChange | None:
        return self.statuses.get(version, (None,))[0]

    def has(self, op: str) -> bool:
        return any(done.op == op for done in self.done)

    def with_move(self, move: ChannelMove) -> Log:
        moves = {**self.moves, move.channel: (move, *self.moves.get(move.channel, ()))}
        return replace(self, moves=moves)._after(move.op, f"channel {move.channel}")

    def with_status(self, version: int, change: StatusChange, *, op: str) -> Log:
        statuses = {**self.statuses, version: (change, *self.statuses.get(version, ()))}
        return replace(self, statuses=statuses)._after(op, f"status {version}")

    def with_evaluation(self, version: int, evaluation: Evaluation, *, op: str) -> Log:
        evaluations = {**self.evaluations, version: (evaluation, *self.evaluations.get(version, ()))}
        return replace(self, evaluations=evaluations)._after(op, f"evaluation {version}")

    def with_signature(self, digest: str, signature: Signature, *, op: str) -> Log:
        """One of the same key that is there stays as it is."""
        there = self.signatures.get(digest, {})
        if signature.key in there:
            return self
        signatures = {**self.signatures, digest: {**there, signature.key: signature.bundle}}
        return replace(self, signatures=signatures)._after(op, f"signature {digest}")

    def _after(self, op: str, what: str) -> Log:
        return replace(self, done=(*self.done, Done(op, what, now())))


def log_to_bytes(log: Log) -> bytes:
    def plain(data: bytes) -> Any:
        return parse_json(data, what="an entry")

    return canonical_json(
        {
            "format": FORMAT,
            "channels": {c: [plain(entries.move_to_bytes(m)) for m in moves] for c, moves in log.moves.items()},
            "statuses": {str(v): [plain(entries.status_to_bytes(s)) for s in all_] for v, all_ in log.statuses.items()},
            "evaluations": {
                str(v): [plain(entries.evaluation_to_bytes(e)) for e in all_] for v, all_ in log.evaluations.items()
            },
            "signatures": {
                digest: {key: base64.b64encode(bundle).decode() for key, bundle in keys.items()}
                for digest, keys in log.signatures.items()
            },
            "done": [{"op": done.op, "what": done.what, "when": done.when} for done in log.done],
        }
    )


def log_from_bytes(data: bytes, *, where: str) -> Log:
    """Raises IntegrityError for what is no log, Unsupported for a newer format."""
    raw = parse_json(data, what=where, limit=_LIMIT)
    try:
        entries.check_format(raw, where)
        return Log(
            moves={c: _all(moves, entries.move_from_bytes, where) for c, moves in _part(raw, "channels")},
            statuses={int(v): _all(all_, entries.status_from_bytes, where) for v, all_ in _part(raw, "statuses")},
            evaluations={
                int(v): _all(all_, entries.evaluation_from_bytes, where) for v, all_ in _part(raw, "evaluations")
            },
            signatures={
                digest: {key: base64.b64decode(bundle, validate=True) for key, bundle in keys.items()}
                for digest, keys in _part(raw, "signatures")
            },
            done=tuple(Done(d["op"], d["what"], d["when"]) for d in raw.get("done", [])),
        )
    except (KeyError, TypeError, ValueError, AttributeError, binascii.Error) as error:
        raise IntegrityError(f"{where} cannot be read", why=repr(error)) from error


def _part(raw: Json, name: str) -> Any:
    return raw.get(name, {}).items()


def _all(values: Any, read: Read[T], where: str) -> tuple[T, ...]:
    found = tuple(read(canonical_json(value), key=where) for value in values)
    if not found:
        raise ValueError("an empty list")
    return found
