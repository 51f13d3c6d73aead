"""`ah fsck`: is everything in the registry as it was published?"""

from __future__ import annotations

from typing import Annotated

import typer

from adapterhub.cli.output import JsonOption, RegistryOption, bytes_shown, print_json
from adapterhub.errors import NotFound
from adapterhub.manifest import to_plain
from adapterhub.refs import AdapterName, check_tenant
from adapterhub.registry import Registry, open_registry
from adapterhub.settings import load_settings


def fsck(
    what: Annotated[
        str | None,
        typer.Argument(metavar="[TENANT[/ADAPTER]]", help="Nothing: the whole registry.", show_default=False),
    ] = None,
    registry_url: RegistryOption = None,
    as_json: JsonOption = False,
) -> None:
    """Check every record, file and log; exit 1 where something is broken. Nothing is changed."""
    from adapterhub.registry.fsck import fsck as check

    registry = open_registry(registry_url or load_settings().registry)
    with bytes_shown("checking", quiet=as_json) as progress:
        report = check(registry, _names(registry, what), progress=progress)
    if as_json:
        print_json(to_plain(report))
    else:
        for problem in report.problems:
            typer.echo(f"{problem.where}: {problem.what}\n  next: {problem.next}")
        found = f"{len(report.problems)} problems" if report.problems else "all as published"
        checked = f"{report.adapters} adapters, {report.versions} versions, {report.files} files of {report.size} bytes"
        typer.echo(f"{registry.url}: {checked}: {found}", err=True)
    raise typer.Exit(0 if report.is_clean else 1)


def _names(registry: Registry, what: str | None) -> list[AdapterName] | None:
    if what is None:
        return None
    if "/" in what:
        return [AdapterName.parse(what)]
    check_tenant(what)
    if names := registry.adapters(what):
        return names
    raise NotFound(f"there is no tenant {what!r} in {registry.url}", hint="ah ls")
