"""What is on the bill: counts by hour, tenant, key, adapter and version, and how they add up. Pure.

    tally.add(Line(...), Counts(requests=1, tokens_in=31, tokens_out=12))
    batch = tally.take()        what came since the last batch, with a number of its own: `ledger` books it once

An hour is UTC's, and it is the one in which a request ended. Counts are whole numbers, so that sums are the same in
whatever order they are made.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field, fields
from datetime import UTC, datetime
from functools import lru_cache
from typing import Any

from adapterhub.refs import AdapterName
from adapterhub.serving.arguments import BASE_NAME

NOBODY = ""  # the tenant and the key of a server without keys; the key of what no request asked for


@dataclass(frozen=True)
class Line:
    """Whose account something goes to."""

    tenant: str
    key: str  # its id
    adapter: str  # acme/support, or base
    version: int  # 0: the base

    @classmethod
    def of(cls, *, tenant: str | None, key: str | None, model: str) -> Line:
        """``model`` as the engine knows it: ``base``, or a version like ``acme/support@3``."""
        return _line(tenant or NOBODY, key or NOBODY, model)

    @classmethod
    def of_owner(cls, model: str, *, keyed: bool) -> Line:
        """For what a version takes that no single request asked for: its owner's, where there are tenants at all."""
        owner = AdapterName.parse(model.partition("@")[0]).tenant if model != BASE_NAME else None
        return cls.of(tenant=owner if keyed else None, key=None, model=model)


@lru_cache(4096)
def _line(tenant: str, key: str, model: str) -> Line:
    adapter, _, version = model.partition("@")
    return Line(tenant, key, adapter, int(version or 0))


@dataclass(frozen=True)
class Counts:
    """What was used. Tokens are the engine's own."""

    requests: int = 0  # that reached the engine, however they ended
    cancelled: int = 0  # of them: the client left
    failed: int = 0  # of them: answered with an error, or broken off
    tokens_in: int = 0
    tokens_out: int = 0
    tokens_cached: int = 0  # of tokens_in: not computed again
    cold_loads: int = 0
    resident_ms: int = 0  # milliseconds in the engine's memory

    def __add__(self, other: Counts) -> Counts:
        return Counts(
            self.requests + other.requests,
            self.cancelled + other.cancelled,
            self.failed + other.failed,
            self.tokens_in + other.tokens_in,
            self.tokens_out + other.tokens_out,
            self.tokens_cached + other.tokens_cached,
            self.cold_loads + other.cold_loads,
            self.resident_ms + other.resident_ms,
        )

    def __bool__(self) -> bool:
        return self != _NOTHING


COUNTS = tuple(f.name for f in fields(Counts))
_NOTHING = Counts()


@dataclass(frozen=True)
class Batch:
    """What one server counted between two flushes. ``writer`` and ``number`` together are never used again."""

    writer: str
    number: int  # from 1, without gaps
    rows: Mapping[tuple[str, Line], Counts]  # (hour, whose) → what

    def to_json(self) -> str:
        """One line of text."""
        rows = [[hour, *asdict(line).values(), *asdict(counts).values()] for (hour, line), counts in self.rows.items()]
        return json.dumps([self.writer, self.number, rows], separators=(",", ":"))

    @classmethod
    def from_json(cls, text: str) -> Batch:
        """Raises ValueError for what is no batch: the last line of a server that was killed while it wrote."""
        try:
            writer, number, rows = json.loads(text)
            split = 1 + len(fields(Line))
            parsed = {(str(row[0]), Line(*row[1:split])): Counts(*map(int, row[split:])) for row in rows}
            return cls(str(writer), int(number), parsed)
        except (TypeError, IndexError) as error:
            raise ValueError(f"no batch: {error}") from error


@dataclass
class Tally:
    """What one server has counted since its last batch."""

    writer: str
    _number: int = 0
    _rows: dict[tuple[str, Line], Counts] = field(default_factory=dict)

    def add(self, line: Line, counts: Counts, *, hour: str) -> None:
        if counts:
            place = (hour, line)
            before = self._rows.get(place)
            self._rows[place] = before + counts if before else counts

    def take(self) -> Batch | None:
        """All of it, once; None where there is nothing."""
        if not self._rows:
            return None
        self._number += 1
        batch = Batch(self.writer, self._number, self._rows)
        self._rows = {}
        return batch


def hour_of(at: datetime) -> str:
    """``2026-11-25T14``, UTC: as text it sorts as time does, in every database."""
    return _hour(int(at.timestamp()) // 3600)


@lru_cache(64)
def _hour(number: int) -> str:
    """``number`` of hours since 1970."""
    return datetime.fromtimestamp(number * 3600, UTC).strftime("%Y-%m-%dT%H")


BY = ("tenant", "adapter", "version", "key", "day")


def summed(rows: Iterable[tuple[str, Line, Counts]], *, by: str) -> list[dict[str, Any]]:
    """One entry for each tenant, adapter …, in order; each with the names it is known by and all counts."""
    sums: dict[tuple[Any, ...], Counts] = {}
    for hour, line, counts in rows:
        place = tuple(_named(by, hour, line).items())
        sums[place] = sums.get(place, Counts()) + counts
    ordered = sorted(sums.items(), key=lambda entry: [value for _, value in entry[0]])
    return [dict(place) | shown(counts) for place, counts in ordered]


def labelled(found: Iterable[dict[str, Any]], labels: Mapping[str, str]) -> list[dict[str, Any]]:
    """Entries by key, each with what people call the key; empty for one that is gone: a bill outlives it."""
    return [{"tenant": e["tenant"], "key": e["key"], "label": labels.get(e["key"], "")} | e for e in found]


def shown(counts: Counts) -> dict[str, Any]:
    """For people and programs: residence in seconds."""
    values: dict[str, Any] = asdict(counts)
    values["resident_seconds"] = values.pop("resident_ms") / 1000
    return values


def _named(by: str, hour: str, line: Line) -> dict[str, Any]:
    if by == "day":
        return {"day": hour[:10]}
    if by == "version":
        return {"adapter": line.adapter, "version": line.version}
    if by == "key":
        return {"tenant": line.tenant, "key": line.key}
    return {by: getattr(line, by)}
