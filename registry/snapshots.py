"""A listing snapshot: a tenant's adapters as they were read once, so that a list reads what happened since. No I/O.

It is derived and can be rebuilt; nothing but lists looks into it: what is served is always resolved from the logs.
"""

from __future__ import annotations

import json
import zlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, get_args

from adapterhub.errors import IntegrityError, InvalidName
from adapterhub.manifest import FORMAT, canonical_json, from_plain, to_plain
from adapterhub.refs import AdapterName
from adapterhub.registry.base import Overview, Status, Summary, Target
from adapterhub.registry.entries import check_format
from adapterhub.registry.overview import Found, Seen

_LARGEST = 512 * 2**20  # bytes, unpacked: a million versions
_GZIP = 16 + zlib.MAX_WBITS


@dataclass(frozen=True)
class Snapshot:
    """What was known at one moment."""

    scanned: float  # when everything was looked at last: seconds since 1970
    cursor: str  # events that sort after it are older, and are all in it
    counted: frozenset[str] = frozenset()  # keys of newer events that are in it
    adapters: Mapping[AdapterName, Seen] = field(default_factory=dict)


def to_bytes(snapshot: Snapshot) -> bytes:
    plain = {
        "format": FORMAT,
        "scanned": snapshot.scanned,
        "cursor": snapshot.cursor,
        "counted": sorted(snapshot.counted),
        "adapters": {name.adapter: _plain(seen) for name, seen in snapshot.adapters.items()},
    }
    packer = zlib.compressobj(level=6, wbits=_GZIP)
    return packer.compress(canonical_json(plain)) + packer.flush()


def _plain(seen: Seen) -> dict[str, Any]:
    summaries = [to_plain(summary) for summary in seen.overview.versions]
    for summary in summaries:
        del summary["name"]
    targets = {channel: [to_plain(t) for t in its] for channel, its in seen.overview.channels.items()}
    logs = {"moves": seen.found.moves, "statuses": seen.found.statuses, "evaluations": seen.found.evaluations}
    return {"versions": summaries, "channels": targets, **{log: to_plain(its) for log, its in logs.items()}}


def from_bytes(data: bytes, *, tenant: str, key: str) -> Snapshot:
    """Raises IntegrityError for what is none, Unsupported for a newer format."""
    try:
        unpacker = zlib.decompressobj(wbits=_GZIP)
        text = unpacker.decompress(data, _LARGEST)
        if not unpacker.eof:
            raise ValueError("it is cut, or too large")
        raw = json.loads(text)
        check_format(raw, key)
        return Snapshot(
            scanned=float(raw["scanned"]),
            cursor=str(raw["cursor"]),
            counted=frozenset(map(str, raw["counted"])),
            adapters=dict(_seen(AdapterName(tenant, adapter), its) for adapter, its in raw["adapters"].items()),
        )
    except (zlib.error, ValueError, KeyError, TypeError, AttributeError, RecursionError, InvalidName) as error:
        raise IntegrityError(f"{key} cannot be read", why=repr(error)) from error


def _seen(name: AdapterName, raw: Mapping[str, Any]) -> tuple[AdapterName, Seen]:
    summaries = tuple(from_plain(Summary, {**summary, "name": name}) for summary in raw["versions"])
    if any(summary.status not in get_args(Status) for summary in summaries):
        raise ValueError(f"a status of {name}")
    channels = {channel: tuple(from_plain(Target, t) for t in its) for channel, its in raw["channels"].items()}
    found = Found(
        versions=tuple(summary.version for summary in summaries),
        moves={channel: int(seq) for channel, seq in raw["moves"].items()},
        statuses={int(number): int(seq) for number, seq in raw["statuses"].items()},
        evaluations={int(number): int(count) for number, count in raw["evaluations"].items()},
    )
    if not summaries or found.moves.keys() != channels.keys() or not all(channels.values()):
        raise ValueError(f"the channels of {name}")
    return name, Seen(found, Overview(name, summaries, channels))
