"""Reads data files whole and strictly, before any model is loaded.

What the rows are is told from the config, or from the first row; every row then has to be that. Every bad row is named
as ``file:line``, with what was expected.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from adapterhub.errors import DataError
from adapterhub.trainers.config import DataSource
from adapterhub.trainers.data.formats import format_of
from adapterhub.trainers.data.rows import BadRow, Row
from adapterhub.trainers.data.strictjson import parse_object

_SHOWN_ERRORS = 5


@dataclass(frozen=True)
class DataFile:
    """One file, read and checked."""

    path: Path
    sha256: str
    format: str  # as it is shown: "messages", "sharegpt", "prompt/completion", …
    detected: bool  # told from the first row rather than from the config
    rows: tuple[Row, ...]
    unused: tuple[str, ...] = ()  # columns that nothing is made of


def read_source(source: DataSource, *, beside: Path | None = None) -> DataFile:
    """Read one entry of ``datasets``.

    Args:
        beside: the config file's folder, where a relative path is looked up first; then in the working directory.

    Raises:
        DataError: the file is missing, unreadable, empty, of no known format, or has bad rows (the first five named).
    """
    path = _find(source.path, beside)
    digest = hashlib.sha256()
    rows: list[Row] = []
    bad: list[tuple[int, BadRow]] = []
    columns: dict[str, None] = {}  # in the order of the file
    shown, reader = "", None
    for number, line in _lines(path, digest):
        try:
            raw = parse_object(line)
            columns.update(dict.fromkeys(raw))
            if reader is None:
                shown, reader = format_of(source, raw)
            rows.append(reader(raw, f"{path}:{number}"))
        except BadRow as error:
            bad.append((number, error))
    if bad:
        raise _bad_rows(path, bad, len(rows) + len(bad))
    if reader is None:
        raise DataError(f"{path} is empty", why="it holds no rows", hint="write one JSON object a line")
    unused = tuple(column for column in columns if column not in reader.columns)
    return DataFile(path, digest.hexdigest(), shown, source.type is None, tuple(rows), unused)


# ── files and lines ──────────────────────────────────────────────────────────────────────────────────────────


def _find(written: str, beside: Path | None) -> Path:
    here = Path(written).expanduser()
    choices = [here] if here.is_absolute() or beside is None else [beside / here, here]
    for path in choices:
        if path.is_file():
            return path
    if any(path.is_dir() for path in choices):
        raise DataError(f"{written} is a folder", hint="name a JSONL file in it")
    raise DataError(
        f"the data file {written} was not found",
        why="looked for " + " and ".join(str(path) for path in choices),
        hint="check datasets: path, or name it with --data",
    )


def _lines(path: Path, digest: Any) -> Iterator[tuple[int, bytes]]:
    """Lines that hold something, with their numbers from 1; blank ones are no rows."""
    try:
        with path.open("rb") as file:
            for number, line in enumerate(file, 1):
                digest.update(line)
                line = line.removeprefix(b"\xef\xbb\xbf") if number == 1 else line
                if line.strip():
                    yield number, line
    except OSError as error:
        raise DataError(f"{path} cannot be read", why=error.strerror or str(error)) from error


def _bad_rows(path: Path, bad: list[tuple[int, BadRow]], total: int) -> DataError:
    line, first = bad[0]
    why = f"expected {first.expected}" if first.expected else ""
    if len(bad) > 1:
        others = ", ".join(str(number) for number, _ in bad[1:_SHOWN_ERRORS])
        more = f" and {len(bad) - _SHOWN_ERRORS} more" if len(bad) > _SHOWN_ERRORS else ""
        why += f"{'; ' if why else ''}{len(bad)} of {total} rows are bad, also line{'s'[: len(bad) > 2]} {others}{more}"
    return DataError(f"{path}:{line}: {first.what}", why=why, hint=f"look at it: sed -n {line}p {path}")
