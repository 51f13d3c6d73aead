"""The JSON of the logs' entries: channel moves, status changes, evaluations. No I/O."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, get_args

from adapterhub.errors import IntegrityError, InvalidName, Unsupported
from adapterhub.manifest import FORMAT, canonical_json, from_plain, parse_json, to_plain
from adapterhub.registry.base import ChannelMove, Evaluation, Status, StatusChange, Target


def move_to_bytes(move: ChannelMove) -> bytes:
    return canonical_json({"format": FORMAT, **to_plain(move)})


def move_from_bytes(data: bytes, *, key: str) -> ChannelMove:
    """Raises IntegrityError, Unsupported."""
    with _reading(key):
        raw = _object(data, key)
        targets = tuple(from_plain(Target, t) for t in raw.pop("targets"))
        if not targets:
            raise ValueError("it names no version")
        move: ChannelMove = from_plain(ChannelMove, raw | {"targets": targets})
        return move


def status_to_bytes(change: StatusChange) -> bytes:
    return canonical_json({"format": FORMAT, **to_plain(change)})


def status_from_bytes(data: bytes, *, key: str) -> StatusChange:
    """Raises IntegrityError, Unsupported."""
    with _reading(key):
        change: StatusChange = from_plain(StatusChange, _object(data, key))
        if change.status not in get_args(Status):  # nobody may guess whether such a version can be used
            raise ValueError(f"the status is {change.status!a}")
        return change


def evaluation_to_bytes(evaluation: Evaluation) -> bytes:
    return canonical_json({"format": FORMAT, **to_plain(evaluation)})


def evaluation_from_bytes(data: bytes, *, key: str) -> Evaluation:
    """Raises IntegrityError, Unsupported."""
    with _reading(key):
        evaluation: Evaluation = from_plain(Evaluation, _object(data, key))
        return evaluation


def _object(data: bytes, key: str) -> dict[str, Any]:
    raw = parse_json(data, what=key)
    if not isinstance(raw, dict):
        raise TypeError(f"a JSON object was expected, not {type(raw).__name__}")
    check_format(raw, key)
    return raw


def check_format(raw: dict[str, Any], key: str) -> None:
    """Raises Unsupported for what a newer AdapterHub wrote, KeyError where no format is told."""
    if raw["format"] > FORMAT:
        raise Unsupported(
            f"{key} has format {raw['format']}, this AdapterHub reads up to {FORMAT}",
            why="it was written by a newer AdapterHub",
            hint="pip install --upgrade adapterhub",
        )


@contextmanager
def _reading(key: str) -> Iterator[None]:
    try:
        yield
    except (ValueError, KeyError, TypeError, AttributeError, InvalidName) as error:
        raise IntegrityError(f"{key} cannot be read", why=repr(error)) from error
