"""Reads data files whole and strictly, before any model is loaded.

What the rows are is told from the config, or from the first row; every row then has to be that. Every bad row is named
as ``file:line``, with what was expected.
"""

from __future__ import annotations

import hashlib
from array import array
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, overload

from adapterhub.errors import DataError
from adapterhub.trainers.config import DataSource, Method
from adapterhub.trainers.data.files import Container, Value
from adapterhub.trainers.data.formats import Reader, format_of
from adapterhub.trainers.data.places import HubRows, find
from adapterhub.trainers.data.rows import BadRow, Preference, Row, is_chat
from adapterhub.trainers.data.strictjson import check_characters, parse_object, to_json

_SHOWN_ERRORS = 5


@dataclass(frozen=True)
class DataFile:
    """One file, read and checked."""

    path: Path
    sha256: str
    format: str  # as it is shown: "messages", "sharegpt", "prompt/completion", …
    detected: bool  # told from the first row rather than from the config
    rows: PackedRows
    chat: bool = False  # some rows are conversations
    unused: tuple[str, ...] = ()  # columns that nothing is made of
    duplicates: int = 0  # rows that are there already
    skipped: tuple[str, ...] = ()  # bad rows that were allowed: where, and what is wrong


class PackedRows(Sequence[Row | Preference]):
    """Rows as their JSON text, each read again when it is asked for: a million of them are as large as their file."""

    def __init__(self, reader: Reader, where: Callable[[int], str], numbers: Sequence[int], texts: list[bytes]) -> None:
        self._reader, self._where, self._numbers, self._texts = reader, where, numbers, texts

    def __len__(self) -> int:
        return len(self._texts)

    def text(self, i: int) -> bytes:
        """The row's JSON, by which it is known."""
        return self._texts[i].strip()

    @overload
    def __getitem__(self, i: int) -> Row | Preference: ...
    @overload
    def __getitem__(self, i: slice) -> Sequence[Row | Preference]: ...
    def __getitem__(self, i: int | slice) -> Row | Preference | Sequence[Row | Preference]:
        if isinstance(i, slice):
            return [self[k] for k in range(*i.indices(len(self)))]
        return self._reader(parse_object(self._texts[i]), self._where(self._numbers[i]))


def read_source(
    source: DataSource, *, beside: Path | None = None, skip_bad_rows: int = 0, method: Method | None = None
) -> DataFile:
    """Read one entry of ``datasets``.

    Args:
        beside: the config file's folder, where a relative path is looked up first; then in the working directory.
        skip_bad_rows: so many bad rows are left out and told of; one more is an error.
        method: of preference training, whose rows these are; None: supervised.

    Raises:
        DataError: the data set is missing, unreadable, empty, of no known format, or has bad rows (five are named).
    """
    place = find(source, beside)
    reading = _Reading(source, place, skip_bad_rows, method)
    for number, value in place.rows():
        reading.take(number, value)
    return reading.finished()


@dataclass
class _Reading:
    """One pass over a file's rows."""

    source: DataSource
    place: Container | HubRows
    allowed: int
    method: Method | None = None
    reader: Reader | None = None
    shown: str = ""
    chat: bool = False
    total: int = 0
    numbers: array[int] = field(default_factory=lambda: array("Q"))
    texts: list[bytes] = field(default_factory=list)
    columns: dict[str, None] = field(default_factory=dict)  # in the order of the file
    seen: set[int] = field(default_factory=set)  # hashes of rows
    bad: list[tuple[int, BadRow]] = field(default_factory=list)

    def take(self, number: int, value: Value) -> None:
        self.total += 1
        try:
            raw = _checked(value)
            self.columns.update(dict.fromkeys(raw))
            if self.reader is None:
                self.shown, self.reader = format_of(self.source, raw, self.method)
            row = self.reader(raw, "")
        except BadRow as error:
            self.bad.append((number, error))
            return
        if len(self.bad) > self.allowed:
            self.texts.clear()  # nothing will be trained on: only counted
            return
        self.chat = self.chat or is_chat(row)
        text = value if isinstance(value, bytes) else to_json(raw)
        self.numbers.append(number)
        self.texts.append(text)
        self.seen.add(hash(text.strip()))

    def finished(self) -> DataFile:
        path = self.place.path
        if len(self.bad) > self.allowed:
            raise _bad_rows(self.place, self.bad, self.total, self.allowed)
        if self.reader is None or not self.texts:
            raise DataError(f"{path} is empty", why="it holds no rows", hint="write one JSON object a line")
        return DataFile(
            path=path,
            sha256=self.place.sha256() or hashlib.sha256(b"\n".join(self.texts)).hexdigest(),
            format=self.shown,
            detected=self.source.type is None,
            rows=PackedRows(self.reader, self.place.where, self.numbers, self.texts),
            chat=self.chat,
            unused=tuple(column for column in self.columns if column not in self.reader.columns),
            duplicates=len(self.texts) - len(self.seen),
            skipped=tuple(f"{self.place.where(number)}: {error.what}" for number, error in self.bad),
        )


def _checked(value: Value) -> dict[str, Any]:
    if isinstance(value, BadRow):
        raise value
    if isinstance(value, bytes):
        return parse_object(value)
    check_characters(value)
    return dict(value)


def _bad_rows(place: Container | HubRows, bad: list[tuple[int, BadRow]], total: int, allowed: int) -> DataError:
    number, first = bad[0]
    why = f"expected {first.expected}" if first.expected else ""
    if len(bad) > 1:
        others = ", ".join(str(number) for number, _ in bad[1:_SHOWN_ERRORS])
        more = f" and {len(bad) - _SHOWN_ERRORS} more" if len(bad) > _SHOWN_ERRORS else ""
        lines = ("line" if place.lined else "row") + "s"[: len(bad) > 2]
        why += f"{'; ' if why else ''}{len(bad)} of {total} rows are bad, also {lines} {others}{more}"
    why += f"; skip_bad_rows allows {allowed}" if allowed else ""
    return DataError(f"{place.where(number)}: {first.what}", why=why, hint=place.look(number))
