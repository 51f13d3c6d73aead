"""The story of an adapter: its versions and all of its logs as one list, newest first. No I/O."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from adapterhub.registry.base import ChannelMove, Logs, Version


@dataclass(frozen=True)
class Happening:
    """One thing that somebody did."""

    when: str  # ISO 8601, UTC
    who: str
    what: str  # "published", "prod → 3", "yanked", "evaluated heldout"
    versions: tuple[int, ...]  # that it is about
    channel: str = ""
    why: str = ""  # for an evaluation: what was measured


def history(versions: Sequence[Version], logs: Logs) -> list[Happening]:
    """Newest first; of one second, what happened to an adapter comes before what had to happen for it."""
    return sorted(_all(versions, logs), key=lambda happening: happening.when)[::-1]


def _all(versions: Sequence[Version], logs: Logs) -> Iterator[Happening]:
    for record in (version.record for version in reversed(versions)):
        labels = " ".join(f"{key}={value}" for key, value in record.labels.items())
        yield Happening(record.created, record.author, "published", (record.version,), why=labels)
    for number, evaluations in logs.evaluations.items():
        for e in reversed(evaluations):
            measured = ", ".join(f"{metric} {value:g}" for metric, value in e.metrics.items())
            yield Happening(e.when, e.who, f"evaluated {e.suite}", (number,), why=measured)
    for number, changes in logs.statuses.items():
        for change in reversed(changes):
            what = "active again" if change.status == "active" else change.status
            yield Happening(change.when, change.who, what, (number,), why=change.why)
    for channel, moves in logs.moves.items():
        for move in reversed(moves):
            pointed = tuple(target.version for target in move.targets)
            yield Happening(move.when, move.who, _move(move), pointed, channel=channel, why=move.why)


def _move(move: ChannelMove) -> str:
    to = (
        str(move.main.version)
        if len(move.targets) == 1
        else " ".join(f"{target.version}:{target.weight}%" for target in move.targets)
    )
    return f"{move.channel} {'back to' if move.kind == 'rollback' else '→'} {to}"
