"""How `ah` speaks: people read stderr and tables, programs read one JSON document on stdout."""

from __future__ import annotations

import json
import sys
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.markup import escape

from adapterhub.errors import AdapterHubError

out = Console(highlight=False, soft_wrap=True)
err = Console(stderr=True, highlight=False, soft_wrap=True)

JsonOption = Annotated[bool, typer.Option("--json", help="Print one JSON document instead of text.")]
RegistryOption = Annotated[
    str | None,
    typer.Option(
        "--registry",
        metavar="URL",
        help="Where versions live: file:///…; default $AH_REGISTRY, then ~/.adapterhub/registry.",
    ),
]
BaseOption = Annotated[
    str | None,
    typer.Option("--base", metavar="DIR|HUB_ID", help="The base model: a folder or a Hub id; default $AH_BASE."),
]


def print_json(data: Any) -> None:
    """One JSON document on stdout, whatever the terminal."""
    sys.stdout.write(json.dumps(data, indent=2, ensure_ascii=False) + "\n")


def say(text: str) -> None:
    """A line for people, on stderr. ``text`` may hold rich markup: escape what came from outside."""
    err.print(text)


def report(error: AdapterHubError) -> int:
    """Print what, why and the next command; return the exit code."""
    err.print(f"[bold red]error:[/] {escape(error.what)}")
    if error.why:
        err.print(f"  [dim]why:[/]  {escape(error.why)}")
    if error.hint:
        err.print(f"  [dim]next:[/] {escape(error.hint)}")
    return error.exit_code
