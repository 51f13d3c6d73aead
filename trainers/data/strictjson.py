"""JSON as strictly as RFC 8259 lets us, and fast: what other readers take silently is an error with its column.

A key that is there twice, NaN, half a surrogate pair, bytes that are no UTF-8. msgspec parses; Python's own parser
says what is wrong where it refuses. Two keys alike are found by counting: what looks like the end of a key in the
bytes, and keys in the result. Only where the two differ (a string may look like it) each object is looked at.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from typing import Any

import msgspec

from adapterhub.trainers.data.rows import BadRow, kind

_KEY_END = re.compile(rb'"\s*:')
_EXPECTED = "one JSON object a line"


def parse_object(line: bytes) -> dict[str, Any]:
    """One row. Raises BadRow."""
    value = parse(line)
    if not isinstance(value, dict):
        raise BadRow(f"the row is {'null' if value is None else kind(value)}", _EXPECTED)
    return value


def parse(text: bytes) -> Any:
    """A JSON text. Raises BadRow: with the column where known."""
    try:
        value = msgspec.json.decode(text)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
        return _parse_slowly(text)
    if len(_KEY_END.findall(text)) != _keys(value) or b"\\u0000" in text:
        _parse_slowly(text)
    return value


def to_json(value: Any) -> bytes:
    """Raises BadRow: the value is none of JSON's, like a date."""
    try:
        return msgspec.json.encode(value)
    except (TypeError, ValueError, RecursionError) as error:
        raise BadRow(f"the row is not JSON: {error}", "text, numbers, lists and objects") from error


def _keys(value: Any) -> int:
    """Keys of all objects. A loop, and exact types: this is run for every row."""
    found, waiting = 0, [value]
    while waiting:
        value = waiting.pop()
        if type(value) is dict:
            found += len(value)
            value = value.values()
        elif type(value) is not list:
            continue
        waiting += [inner for inner in value if type(inner) is dict or type(inner) is list]
    return found


def _parse_slowly(text: bytes) -> Any:
    """Says what is wrong, and where."""
    if b"\0" in text:
        raise BadRow(f"a NUL byte at column {text.index(0) + 1}", "text; the file is damaged")
    try:
        decoded = text.decode("utf-8")
    except UnicodeDecodeError as error:
        raise BadRow(f"byte {error.start} is not UTF-8", "UTF-8 text") from error
    try:
        value = json.loads(decoded, object_pairs_hook=_unique, parse_constant=_no_constant)
    except json.JSONDecodeError as error:
        raise BadRow(f"not JSON, column {error.colno}: {error.msg}", _EXPECTED) from error
    except RecursionError as error:
        raise BadRow("not JSON, nested too deep", _EXPECTED) from error
    check_characters(value)
    return value


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        keys = [key for key, _ in pairs]
        twice = next(key for key in keys if keys.count(key) > 1)
        raise BadRow(f"the key {json.dumps(twice)} is there twice", "each key once: one of the two would be lost")
    return found


def _no_constant(name: str) -> Any:
    raise BadRow(f"{name} is no JSON", "a number, or null")


def check_characters(value: Any) -> None:
    """What JSON can write and no text holds: NUL, and one half of a surrogate pair."""
    if isinstance(value, str):
        if "\0" in value:
            raise BadRow("a NUL character (\\u0000)", "text; the row is damaged")
        if any("\ud800" <= c <= "\udfff" for c in value):
            raise BadRow("half a surrogate pair (\\ud800 to \\udfff)", "whole characters; the row was cut")
    elif isinstance(value, Mapping):
        for key, inner in value.items():
            check_characters(key)
            check_characters(inner)
    elif isinstance(value, list):
        for inner in value:
            check_characters(inner)
