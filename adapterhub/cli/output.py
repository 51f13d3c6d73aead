"""How `ah` speaks: people read stderr and tables, programs read one JSON document on stdout.

rich is imported when the first styled line is printed: it costs 0.1 s, and `ah ls` has 0.35 s in all.
"""

from __future__ import annotations

import json
import os
import shutil
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from adapterhub.errors import AdapterHubError

if TYPE_CHECKING:
    from rich.console import Console

JsonOption = Annotated[bool, typer.Option("--json", help="Print one JSON document instead of text.")]
RegistryOption = Annotated[
    str | None,
    typer.Option(
        "--registry",
        metavar="URL",
        help="Where versions live: file:///…, s3://bucket/prefix; default $AH_REGISTRY, then ~/.adapterhub/registry.",
    ),
]
SignOption = Annotated[
    Path | None,
    typer.Option(
        "--sign",
        metavar="KEY",
        help="Sign it with this private key (PEM); $AH_KEY_PASSWORD opens it.",
        show_default=False,
    ),
]
SignedByOption = Annotated[
    list[Path] | None,
    typer.Option(
        "--require-signed-by",
        metavar="PUBKEY",
        help="Refuse what none of these keys signed; may be repeated; default $AH_REQUIRE_SIGNED_BY.",
        show_default=False,
    ),
]
BundleOption = Annotated[
    Path | None,
    typer.Option(
        "--bundle",
        metavar="FILE",
        help="Take versions, and the base if it came along, from a bundle and nothing else.",
        show_default=False,
    ),
]
BaseOption = Annotated[
    str | None,
    typer.Option("--base", metavar="DIR|HUB_ID", help="The base model: a folder or a Hub id; default $AH_BASE."),
]


_NARROWEST = 8  # characters of a column in a narrow terminal


def key_password() -> str | None:
    """What opens a private key that has a password: not from a flag, which every list of processes would show."""
    return os.environ.get("AH_KEY_PASSWORD") or None


@cache
def out() -> Console:
    """The console on stdout, for styled data."""
    from rich.console import Console

    return Console(highlight=False, soft_wrap=True)


@cache
def err() -> Console:
    """The console on stderr, for talk and progress."""
    from rich.console import Console

    return Console(stderr=True, highlight=False, soft_wrap=True)


def print_json(data: Any) -> None:
    """One JSON document on stdout, whatever the terminal."""
    sys.stdout.write(json.dumps(data, indent=2, ensure_ascii=False) + "\n")


def print_table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> None:
    """Columns aligned by spaces, on stdout. In a terminal the widest are cut to fit; a pipe or a log has all of it."""
    lines = [list(head), *(list(row) for row in rows)]
    widths = [max(len(line[i]) for line in lines) for i in range(len(head))]
    if sys.stdout.isatty():
        widths = fitted(widths, shutil.get_terminal_size().columns)
    for line in lines:
        cells = (cut(cell, width).ljust(width) for cell, width in zip(line, widths, strict=True))
        sys.stdout.write("  ".join(cells).rstrip() + "\n")


def fitted(widths: Sequence[int], room: int) -> list[int]:
    """The widths of columns, two spaces between them, that need at most ``room``; the widest give first."""
    room = max(room - 2 * (len(widths) - 1), _NARROWEST * len(widths))
    ceiling = max(widths, default=0)
    while ceiling > _NARROWEST and sum(min(width, ceiling) for width in widths) > room:
        ceiling -= 1
    return [min(width, ceiling) for width in widths]


def cut(text: str, width: int) -> str:
    return text if len(text) <= width else text[: width - 1] + "…"


def say(text: str) -> None:
    """A line for people, on stderr. ``text`` may hold rich markup: escape what came from outside."""
    err().print(text)


@contextmanager
def bytes_shown(doing: str, *, quiet: bool = False) -> Iterator[Callable[[int], None] | None]:
    """Counts bytes on a terminal's stderr; nothing elsewhere."""
    if quiet or not err().is_terminal:
        yield None
        return
    from rich.progress import DownloadColumn, Progress, SpinnerColumn, TextColumn, TransferSpeedColumn

    columns = (SpinnerColumn(), TextColumn(doing), DownloadColumn(), TransferSpeedColumn())
    with Progress(*columns, console=err(), transient=True) as bar:
        task = bar.add_task("", total=None)
        yield lambda size: bar.advance(task, size)


def report(error: AdapterHubError) -> int:
    """Print what, why and the next command; return the exit code."""
    from rich.markup import escape

    err().print(f"[bold red]error:[/] {escape(error.what)}")
    if error.why:
        err().print(f"  [dim]why:[/]  {escape(error.why)}")
    if error.hint:
        err().print(f"  [dim]next:[/] {escape(error.hint)}")
    return error.exit_code
