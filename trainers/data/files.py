"""What is in a file: JSON lines, a JSON array, CSV or Parquet, with gzip around it or not; told by its first bytes.

Every kind gives ``(number, value)``: the value is the row's JSON text or the row itself, or the `BadRow` that it is.
"""

from __future__ import annotations

import csv
import gzip
import hashlib
import io
import json
import sys
import zlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, Literal, cast

from adapterhub.errors import DataError
from adapterhub.trainers.data.rows import BadRow

Kind = Literal["JSON lines", "JSON array", "CSV", "Parquet"]
Value = bytes | Mapping[str, Any] | BadRow

LONGEST_LINE = 64 * 1024 * 1024  # bytes; beyond it a file has no line ends, or is none of text
_FOREIGN = {
    b"\xff\xfe": ("UTF-16", "iconv -f UTF-16 -t UTF-8 {0} > utf8-{0}"),
    b"\xfe\xff": ("UTF-16", "iconv -f UTF-16 -t UTF-8 {0} > utf8-{0}"),
    b"PK\x03\x04": ("a zip archive", "unzip {0}"),
    b"\x28\xb5\x2f\xfd": ("compressed with zstd", "unzstd {0}"),
    b"BZh": ("compressed with bzip2", "bunzip2 -k {0}"),
    b"ARROW1": ("an Arrow file", "save it as Parquet"),
}


@dataclass(frozen=True)
class Container:
    """One file, and what is in it."""

    path: Path
    kind: Kind
    zipped: bool = False

    @property
    def lined(self) -> bool:
        """Whether a row's number is a line's."""
        return self.kind in ("JSON lines", "CSV")

    def where(self, number: int) -> str:
        """A row's place: ``file:line``, or ``file row 3`` where there are no lines."""
        return f"{self.path}:{number}" if self.lined else f"{self.path} row {number}"

    def look(self, number: int) -> str:
        """The command that shows a row."""
        show = f"zcat {self.path} | sed -n {number}p" if self.zipped else f"sed -n {number}p {self.path}"
        return f"look at it: {show}" if self.lined else f"look at row {number} of {self.path}"

    def sha256(self) -> str:
        """Of the file's bytes, as they are stored."""
        with self.path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()

    def rows(self) -> Iterator[tuple[int, Value]]:
        """All rows, in order. Raises DataError: the file is damaged as a whole."""
        read = {"JSON lines": _lines, "JSON array": _array, "CSV": _table, "Parquet": _parquet}[self.kind]
        try:
            yield from read(self)
        except (OSError, EOFError, zlib.error) as error:  # gzip's own are among them
            why = (isinstance(error, OSError) and error.strerror) or str(error)
            raise DataError(f"{self.path} cannot be read", why=why) from error

    def open(self) -> BinaryIO:
        return cast(BinaryIO, gzip.open(self.path)) if self.zipped else self.path.open("rb")


def container(path: Path, ds_type: str | None = None) -> Container:
    """What a file is: by its first bytes, its name and ``ds_type``. Raises DataError: it is none that is read here."""
    try:
        with path.open("rb") as file:
            zipped = file.read(2) == b"\x1f\x8b"
        with Container(path, "JSON lines", zipped).open() as file:
            head = file.read(4096)
    except (OSError, EOFError, zlib.error) as error:
        raise DataError(f"{path} cannot be read", why=getattr(error, "strerror", None) or str(error)) from error
    for magic, (what, command) in _FOREIGN.items():
        if head.startswith(magic):
            raise DataError(f"{path} is {what}", why="rows are read as UTF-8 text, or from Parquet",
                            hint=command.format(path.name))  # fmt: skip
    kind = _kind(path.name.lower().removesuffix(".gz"), head)
    if ds_type and ds_type != {"CSV": "csv", "Parquet": "parquet"}.get(kind, "json"):
        raise DataError(
            f"{path} is {kind}", why=f"ds_type is {ds_type}", hint="take ds_type out: it is told from the file"
        )
    return Container(path, kind, zipped)


def _kind(name: str, head: bytes) -> Kind:
    if head.startswith(b"PAR1"):
        return "Parquet"
    if name.endswith((".csv", ".tsv")):
        return "CSV"
    text = head.removeprefix(b"\xef\xbb\xbf").lstrip()
    if text.startswith(b"[") and (name.endswith(".json") or text[1:].lstrip(b" \t\r")[:1] == b"\n"):
        return "JSON array"
    return "JSON lines"


def _lines(file: Container) -> Iterator[tuple[int, Value]]:
    """Lines that hold something, with their numbers from 1; blank ones are no rows."""
    with file.open() as lines:
        number = 0
        while line := lines.readline(LONGEST_LINE + 1):
            number += 1
            line = line.removeprefix(b"\xef\xbb\xbf") if number == 1 else line
            if len(line) > LONGEST_LINE:
                while line and not line.endswith(b"\n"):
                    line = lines.readline(LONGEST_LINE)
                yield number, BadRow(f"the line is longer than {LONGEST_LINE >> 20} MiB", "one JSON object a line")
            elif line.strip():
                yield number, line


def _array(file: Container) -> Iterator[tuple[int, Value]]:
    import msgspec

    with file.open() as stream:
        text = stream.read().removeprefix(b"\xef\xbb\xbf")
    try:
        found = msgspec.json.decode(text, type=list[msgspec.Raw])
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise DataError(
            f"{file.path}{_place(text)}: not JSON", why=str(error), hint="write a list of objects, or one object a line"
        ) from error
    yield from ((number, bytes(raw)) for number, raw in enumerate(found, 1))


def _place(text: bytes) -> str:
    try:
        json.loads(text)
    except json.JSONDecodeError as error:
        return f":{error.lineno}:{error.colno}"
    except (ValueError, RecursionError):
        pass
    return ""


def _table(file: Container) -> Iterator[tuple[int, Value]]:
    """CSV with a header. All values are text; ``messages`` and ``tools`` are JSON texts."""
    csv.field_size_limit(min(sys.maxsize, LONGEST_LINE))
    tabs = file.path.name.lower().removesuffix(".gz").endswith(".tsv")
    with io.TextIOWrapper(file.open(), encoding="utf-8-sig", newline="") as text:
        rows = csv.reader(text, delimiter="\t" if tabs else ",", strict=True)
        number, header = 1, None
        try:
            for values in rows:
                here, number = number, rows.line_num + 1
                if header is None:
                    header = _header(values, file.path)
                elif values and len(values) != len(header):
                    yield here, BadRow(f"the row has {len(values)} values", f"{len(header)}, as the header has")
                elif values:
                    yield here, dict(zip(header, values, strict=True))
        except (csv.Error, UnicodeDecodeError) as error:
            what = "not UTF-8" if isinstance(error, UnicodeDecodeError) else "not CSV"
            raise DataError(f"{file.path}:{number}: {what}", why=str(error), hint=file.look(number)) from error


def _header(values: list[str], path: Path) -> list[str]:
    twice = next((name for name in values if values.count(name) > 1), None)
    if twice is not None:
        raise DataError(f"{path}:1: the column {twice!a} is there twice", why="one of the two would be lost")
    return values


def _parquet(file: Container) -> Iterator[tuple[int, Value]]:
    import pyarrow
    from pyarrow import parquet

    number = 0
    try:
        with file.open() as stream, parquet.ParquetFile(stream) as table:
            for batch in table.iter_batches(batch_size=1024):
                for row in batch.to_pylist():
                    number += 1
                    yield number, row
    except pyarrow.ArrowException as error:
        raise DataError(f"{file.path} is no Parquet file that can be read", why=str(error).splitlines()[0]) from error
