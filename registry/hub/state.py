"""What one look at an adapter's repository on the Hub tells. No I/O."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from adapterhub.refs import AdapterName
from adapterhub.registry import rules
from adapterhub.registry.base import ChannelMove, Event, Logs, Status
from adapterhub.registry.hub import layout
from adapterhub.registry.hub.client import Refs
from adapterhub.registry.hub.log import Log


@dataclass(frozen=True)
class State:
    """An adapter's repository at one moment."""

    numbers: Mapping[int, str]  # version → commit, newest first
    log: Log
    log_head: str  # commit


def numbers_of(refs: Refs) -> dict[int, str]:
    """Version → commit, newest first; none in a repository that is not ours."""
    if layout.LOG_BRANCH not in refs.branches:
        return {}
    numbers = {layout.number_of(tag): commit for tag, commit in refs.tags.items()}
    return {n: numbers[n] for n in sorted((n for n in numbers if n is not None), reverse=True)}


def moves_of(name: AdapterName, channel: str, log: Log) -> tuple[ChannelMove, ...]:
    if channel not in log.moves:
        raise rules.no_channel(name, channel)
    return log.moves[channel]


def logs_of(log: Log, limit: int | None) -> Logs:
    return Logs(
        moves={channel: moves[:limit] for channel, moves in sorted(log.moves.items())},
        statuses={version: changes[:limit] for version, changes in sorted(log.statuses.items())},
        evaluations={version: found[:limit] for version, found in sorted(log.evaluations.items())},
    )


def status_of(log: Log, version: int) -> Status:
    return rules.status_of(log.newest_status(version))


def events_of(name: AdapterName, state: State, seen: list[int] | None) -> Iterable[Event]:
    """What an adapter did since a cursor: newer versions, then newer entries of its log, newest first."""
    version, length = seen or (0, 0)
    for done in reversed(state.log.done[length:]):
        yield Event(f"{name}/{done.op}", name, done.what, done.when)
    for number in state.numbers:
        if number > version:
            yield Event(f"{name}/{number}", name, "publish", "")
