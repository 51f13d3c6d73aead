"""`ah extract`: a fully tuned model back to an adapter of its base."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from adapterhub.cli.output import BaseOption, JsonOption, bytes_shown, print_json
from adapterhub.errors import UsageError
from adapterhub.settings import load_settings

if TYPE_CHECKING:
    from adapterhub.export.extract import Extracted


def extract(
    tuned: Annotated[str, typer.Option("--tuned", metavar="DIR|HUB_ID", help="The model that was tuned as a whole.")],
    to: Annotated[Path, typer.Option("--to", metavar="DIR", help="A new folder, to be published with ah publish.")],
    rank: Annotated[int, typer.Option("--rank", metavar="N", help="Of the adapter: more holds more.")] = 16,
    base: BaseOption = None,
    as_json: JsonOption = False,
) -> None:
    """Make an adapter of the difference between a tuned model and its base."""
    name = base or load_settings().base
    if name is None:
        raise UsageError(
            "extracting needs the base model",
            why="neither --base nor $AH_BASE names one",
            hint=f"ah extract --base BASE --tuned {tuned} --to {to}",
        )
    from adapterhub.base import find_base
    from adapterhub.export.extract import extract as extract_adapter

    models = find_base(name), find_base(tuned)
    with bytes_shown("comparing", quiet=as_json) as progress:
        result = extract_adapter(*models, to.expanduser().absolute(), rank=rank, progress=progress)
    print_json(result.to_json()) if as_json else _print(result)


def _print(result: Extracted) -> None:
    typer.echo(str(result.path))
    for module, error in result.errors.items():
        typer.echo(f"{error:8.4f}  {module}", err=True)
    typer.echo(
        f"{len(result.errors)} layers of rank {max(result.ranks.values())};"
        f" {result.error:.2%} of their change (Frobenius) is left out",
        err=True,
    )
    if result.lost:
        name, change = max(result.lost.items(), key=lambda item: item[1])
        typer.echo(
            f"warning: {len(result.lost)} tensors changed that LoRA cannot hold, and their change is lost; the most:"
            f" {name}, by {change:.2%} of its size",
            err=True,
        )
