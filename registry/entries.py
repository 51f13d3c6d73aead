"""The JSON of the logs' entries: channel moves, status changes, events. No I/O."""

from __future__ import annotations

import json
from typing import Any

from adapterhub.errors import AdapterHubError, IntegrityError, Unsupported
from adapterhub.manifest import FORMAT, canonical_json, from_plain, to_plain
from adapterhub.refs import AdapterName
from adapterhub.registry.base import ChannelMove, Event, StatusChange, Target


def move_to_bytes(move: ChannelMove) -> bytes:
    return canonical_json({"format": FORMAT, **to_plain(move)})


def move_from_bytes(data: bytes, *, key: str) -> ChannelMove:
    """Raises IntegrityError, Unsupported."""
    try:
        raw = _object(data, key)
        targets = tuple(from_plain(Target, t) for t in raw.pop("targets"))
        move: ChannelMove = from_plain(ChannelMove, raw | {"targets": targets})
    except (KeyError, TypeError, ValueError) as error:
        raise _unreadable(key, error) from error
    if not targets:
        raise IntegrityError(f"{key} cannot be read", why="it names no version")
    return move


def status_to_bytes(change: StatusChange) -> bytes:
    return canonical_json({"format": FORMAT, **to_plain(change)})


def status_from_bytes(data: bytes, *, key: str) -> StatusChange:
    """Raises IntegrityError, Unsupported."""
    try:
        change: StatusChange = from_plain(StatusChange, _object(data, key))
    except (TypeError, ValueError) as error:
        raise _unreadable(key, error) from error
    return change


def event_to_bytes(event: Event) -> bytes:
    return canonical_json({"format": FORMAT, "adapter": event.adapter.adapter, "what": event.what, "when": event.when})


def event_from_bytes(data: bytes, *, key: str, tenant: str) -> Event:
    """Raises IntegrityError, Unsupported."""
    try:
        raw = _object(data, key)
        return Event(key, AdapterName(tenant, raw["adapter"]), raw["what"], raw["when"])
    except (KeyError, TypeError, ValueError) as error:
        raise _unreadable(key, error) from error


def _object(data: bytes, key: str) -> dict[str, Any]:
    raw = json.loads(data)
    if not isinstance(raw, dict):
        raise TypeError(f"a JSON object was expected, not {type(raw).__name__}")
    if raw["format"] > FORMAT:
        raise Unsupported(
            f"{key} has format {raw['format']}, this AdapterHub reads up to {FORMAT}",
            why="it was written by a newer AdapterHub",
            hint="pip install --upgrade adapterhub",
        )
    return raw


def _unreadable(key: str, error: Exception) -> AdapterHubError:
    return IntegrityError(f"{key} cannot be read", why=repr(error))
