"""The adapters of a tenant at one look, from a store: the keys tell what there is, and the newest of it is read.

    keys below a/     Found     which versions there are, and the newest entry of each log
    what these name   Overview  read side by side

A LIST tells a thousand keys, so what costs is the reading: what was read before is handed in and not read again.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from itertools import groupby

from adapterhub.refs import AdapterName
from adapterhub.registry import entries, layout, rules
from adapterhub.registry.base import Evaluation, Overview, StatusChange, Summary, Target
from adapterhub.registry.parallel import side_by_side
from adapterhub.registry.records import Records
from adapterhub.registry.store import Store


@dataclass(frozen=True)
class Found:
    """What the keys of one adapter tell."""

    versions: tuple[int, ...] = ()  # newest first
    moves: Mapping[str, int] = field(default_factory=dict)  # channel → seq of its newest move
    statuses: Mapping[int, int] = field(default_factory=dict)  # version → seq of its newest change
    evaluations: Mapping[int, int] = field(default_factory=dict)  # version → how many


@dataclass(frozen=True)
class Seen:
    """An adapter as it was read, and the keys that it was read from."""

    found: Found
    overview: Overview


def found(keys: Iterable[str], tenant: str) -> Iterator[tuple[AdapterName, Found]]:
    """Of ascending keys below ``a/``: each adapter that has a version. No I/O."""
    prefix = layout.adapters(tenant)
    parts = (key.removeprefix(prefix).split("/") for key in keys)
    for adapter, of_one in groupby(parts, key=lambda part: part[0]):
        its = _found(part[1:] for part in of_one)
        for name in layout.adapter_names(tenant, [adapter] if its.versions else ()):
            yield name, its


def _found(keys: Iterable[list[str]]) -> Found:
    versions: list[int] = []
    newest: dict[str, dict[str, int]] = {"ch": {}, "st": {}, "ev": {}}
    for kind, *rest in keys:
        if kind == "v" and len(rest) == 1:
            versions.append(layout.number_of("/" + rest[0]))
        elif kind in newest and len(rest) == 2:
            newest[kind].setdefault(rest[0], layout.number_of("/" + rest[1]))  # the newest is listed first
    return Found(
        versions=tuple(versions),
        moves=newest["ch"],
        statuses={int(number): seq for number, seq in newest["st"].items()},
        evaluations={int(number): seq for number, seq in newest["ev"].items()},
    )


class Overviews:
    """Reads what keys name."""

    def __init__(self, store: Store) -> None:
        self._store = store
        self._records = Records(store)

    def read(self, found: Mapping[AdapterName, Found], known: Mapping[AdapterName, Seen]) -> dict[AdapterName, Seen]:
        """Every adapter of ``found``; of one that is ``known``, only what its keys tell to be new is read.

        Raises NotFound for what was deleted meanwhile, IntegrityError for what is broken.
        """
        nothing = {name: known.get(name, _unseen(name)) for name in found}
        summaries = self._summaries(found, nothing)
        targets = self._targets(found, nothing)
        return {
            name: Seen(
                its,
                Overview(
                    name=name,
                    versions=tuple(summaries[name, number] for number in its.versions),
                    channels={channel: targets[name, channel] for channel in sorted(its.moves)},
                ),
            )
            for name, its in found.items()
        }

    def _summaries(
        self, found: Mapping[AdapterName, Found], known: Mapping[AdapterName, Seen]
    ) -> dict[tuple[AdapterName, int], Summary]:
        then = {(name, s.version): s for name, seen in known.items() for s in seen.overview.versions}
        wanted = [(name, number) for name, its in found.items() for number in its.versions]
        before = {name: seen.found for name, seen in known.items()}
        same = [of for of in wanted if of in then and _logs(of, found) == _logs(of, before)]
        summaries = {of: then[of] for of in same}
        rest = [of for of in wanted if of not in summaries]
        read = side_by_side(lambda of: self._summary(*of, found[of[0]], then.get(of)), rest)
        return summaries | dict(zip(rest, read, strict=True))

    def _summary(self, name: AdapterName, number: int, its: Found, then: Summary | None) -> Summary:
        """What never changes from ``then``, where it is known; the rest is read."""
        change = self._status(name, number, its.statuses.get(number))
        evaluations = [self._evaluation(name, number, n) for n in range(its.evaluations.get(number, 0), 0, -1)]
        if then is None:
            return rules.summary(rules.with_status(self._records.read(name, number), change), evaluations)
        return replace(then, status=rules.status_of(change), evaluations=rules.newest_measured(evaluations))

    def _status(self, name: AdapterName, number: int, seq: int | None) -> StatusChange | None:
        if seq is None:
            return None
        key = layout.numbered(layout.status_changes(name, number), seq)
        return entries.status_from_bytes(self._store.read(key), key=key)

    def _evaluation(self, name: AdapterName, number: int, seq: int) -> Evaluation:
        key = layout.numbered(layout.evaluations(name, number), seq)
        return entries.evaluation_from_bytes(self._store.read(key), key=key)

    def _targets(
        self, found: Mapping[AdapterName, Found], known: Mapping[AdapterName, Seen]
    ) -> dict[tuple[AdapterName, str], tuple[Target, ...]]:
        def targets(name: AdapterName, channel: str) -> tuple[Target, ...]:
            seq = found[name].moves[channel]
            if known[name].found.moves.get(channel) == seq:
                return known[name].overview.channels[channel]
            key = layout.numbered(layout.moves(name, channel), seq)
            return entries.move_from_bytes(self._store.read(key), key=key).targets

        wanted = [(name, channel) for name, its in found.items() for channel in its.moves]
        return dict(zip(wanted, side_by_side(lambda of: targets(*of), wanted), strict=True))


def _unseen(name: AdapterName) -> Seen:
    return Seen(Found(), Overview(name, (), {}))


def _logs(of: tuple[AdapterName, int], found: Mapping[AdapterName, Found]) -> tuple[int | None, int | None]:
    """How far the logs of a version are."""
    name, number = of
    return found[name].statuses.get(number), found[name].evaluations.get(number)
