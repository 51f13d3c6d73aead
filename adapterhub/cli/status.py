"""`ah yank`, `ah deprecate`, `ah delete`: the status of a version. Its bytes never change."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated

import typer

from adapterhub.cli.output import JsonOption, RegistryOption, print_json
from adapterhub.errors import UsageError
from adapterhub.manifest import to_plain
from adapterhub.refs import AdapterRef
from adapterhub.registry import Registry, Status, StatusChange, open_registry
from adapterhub.settings import load_settings

VersionArgument = Annotated[str, typer.Argument(metavar="TENANT/ADAPTER@VERSION")]
WhyOption = Annotated[str, typer.Option("--why", metavar="TEXT", help="Shown to those who ask for the version.")]


def yank(
    version: VersionArgument,
    undo: Annotated[bool, typer.Option("--undo", help="Give it back the status it had before.")] = False,
    why: WhyOption = "",
    registry_url: RegistryOption = None,
    as_json: JsonOption = False,
) -> None:
    """Withdraw a version: it is refused from now on, by number and through channels."""
    _change(version, "yanked", undo=undo, why=why, registry_url=registry_url, as_json=as_json)


def deprecate(
    version: VersionArgument,
    undo: Annotated[bool, typer.Option("--undo", help="Give it back the status it had before.")] = False,
    why: WhyOption = "",
    registry_url: RegistryOption = None,
    as_json: JsonOption = False,
) -> None:
    """Advise against a version: it works on, with a warning; `latest` steps past it."""
    _change(version, "deprecated", undo=undo, why=why, registry_url=registry_url, as_json=as_json)


def delete(
    version: VersionArgument,
    yes: Annotated[bool, typer.Option("--yes", help="Yes, for ever.")] = False,
    why: WhyOption = "",
    registry_url: RegistryOption = None,
    as_json: JsonOption = False,
) -> None:
    """Delete a version for ever; its number is never used again."""
    if not yes:
        raise UsageError(
            f"deleting {version} is final", why="it cannot be undone", hint=f"ah delete {version} --yes, or ah yank"
        )
    _change(version, "deleted", undo=False, why=why, registry_url=registry_url, as_json=as_json)


def _change(text: str, status: Status, *, undo: bool, why: str, registry_url: str | None, as_json: bool) -> None:
    settings = load_settings()
    registry = open_registry(registry_url or settings.registry)
    ref = AdapterRef.parse(text)
    if ref.version is None:
        raise UsageError(
            f"{text} names no version by its number",
            why="what a channel or a digest means may change before this command is done",
            hint=f"ah ls {ref.name}",
        )
    log = registry.status_log(ref.name, ref.version)
    present = log[0].status if log else "active"
    if undo and present != status:
        raise UsageError(f"{ref} is not {status}", why=f"it is {present}", hint=f"ah show {ref}")
    if status == "deprecated" and present == "yanked":
        raise UsageError(
            f"{ref} is yanked", why="deprecating it would let it be used again", hint=f"ah yank {ref} --undo"
        )
    wanted = _status_before(log) if undo else status
    change = registry.set_status(ref.name, ref.version, wanted, who=settings.author, why=why)
    if change.status in {"yanked", "deleted"}:
        _warn_of_channels(registry, ref, ref.version)
    if as_json:
        print_json({"ref": str(ref), **to_plain(change)})
    else:
        typer.echo(f"{ref} is {change.status}")


def _status_before(log: Sequence[StatusChange]) -> Status:
    """A yanked version may have been deprecated before; what was deprecated was active, whatever its log says."""
    was_deprecated = log[0].status == "yanked" and len(log) > 1 and log[1].status == "deprecated"
    return "deprecated" if was_deprecated else "active"


def _warn_of_channels(registry: Registry, ref: AdapterRef, version: int) -> None:
    for channel, move in registry.channels(ref.name).items():
        if any(target.version == version for target in move.targets):
            typer.echo(f"{ref.name}@{channel} still points at it: ah channel rollback {ref.name} {channel}", err=True)
