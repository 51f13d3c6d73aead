"""`ah gc`, `ah retain`, `ah delete-tenant`: what is kept, and what goes."""

from __future__ import annotations

import re
from typing import Annotated

import typer

from adapterhub.cli.browse import shown_bytes
from adapterhub.cli.output import JsonOption, RegistryOption, print_json, print_table
from adapterhub.errors import NotFound, UsageError
from adapterhub.manifest import to_plain
from adapterhub.refs import AdapterName, check_tenant
from adapterhub.registry import Registry, open_registry
from adapterhub.settings import load_settings

_UNITS = {"m": 60, "h": 3600, "d": 86400}  # seconds
_PINS = 3  # that a line of the table names

DryRunOption = Annotated[bool, typer.Option("--dry-run", help="Change nothing; say what pins each blob.")]


def gc(
    tenants: Annotated[
        list[str] | None, typer.Argument(metavar="[TENANT…]", help="Default: all.", show_default=False)
    ] = None,
    dry_run: DryRunOption = False,
    older_than: Annotated[
        str, typer.Option("--older-than", metavar="TIME", help="Leave younger bytes alone: 30m, 24h, 7d.")
    ] = "24h",
    forget: Annotated[
        str,
        typer.Option("--forget", metavar="ID", help="A publish whose machine is dead.", show_default=False),
    ] = "",
    registry_url: RegistryOption = None,
    as_json: JsonOption = False,
) -> None:
    """Free the bytes that no version needs, while others publish.

    Goes: bytes of deleted versions and of publishes that were killed, unfinished uploads, leftovers of deleted tenants,
    entries of the change log that are older than a week.
    """
    from adapterhub.registry.lifecycle.gc import Patience, collect

    for tenant in tenants or ():
        check_tenant(tenant)
    registry = open_registry(registry_url or load_settings().registry)
    patience = Patience(young=_seconds(older_than))
    report = collect(registry, tenants or None, dry_run=dry_run, patience=patience, forget=forget)
    if as_json:
        print_json({"dry_run": dry_run, **to_plain(report)})
        return
    if dry_run and report.blobs:
        rows = [(b.tenant, b.key[:12], shown_bytes(b.size), _pins(b.pinned_by)) for b in report.blobs]
        print_table(("TENANT", "BLOB", "SIZE", "PINNED BY"), rows)
    would = "would be " if dry_run else ""
    typer.echo(
        f"{report.freed} blobs with {shown_bytes(report.freed_size)} {would}freed, "
        f"{report.unfinished} unfinished writes and {report.hints} old entries of the change log {would}removed",
        err=True,
    )
    for note in report.notes:
        typer.echo(f"note: {note}", err=True)


def retain(
    what: Annotated[str, typer.Argument(metavar="TENANT[/ADAPTER]")],
    last: Annotated[int, typer.Option("--last", metavar="N", help="Keep the newest N versions in use.")] = 10,
    days: Annotated[
        float, typer.Option("--days", metavar="D", help="Keep what a channel pointed at less than D days ago.")
    ] = 90,
    yes: Annotated[bool, typer.Option("--yes", help="Delete for ever; without it nothing is changed.")] = False,
    registry_url: RegistryOption = None,
    as_json: JsonOption = False,
) -> None:
    """Delete old versions by rule, and say why each stays or goes. What a channel points at always stays.

    Example: ah retain acme --last 10 --days 90 --yes && ah gc acme
    """
    from adapterhub.registry.lifecycle.retention import Policy
    from adapterhub.registry.lifecycle.retention import retain as apply

    settings = load_settings()
    policy = Policy(last, days)
    registry = open_registry(registry_url or settings.registry)
    decisions = {
        name: apply(registry, name, policy, who=settings.author, dry_run=not yes) for name in _names(registry, what)
    }
    if as_json:
        found = [{"adapter": str(name), **to_plain(one)} for name, all_ in decisions.items() for one in all_]
        print_json({"dry_run": not yes, "versions": found})
        return
    rows = [
        (f"{name}@{one.version}", "keep" if one.keep else "delete", shown_bytes(one.size), one.why)
        for name, all_ in decisions.items()
        for one in all_
    ]
    print_table(("VERSION", "", "SIZE", "WHY"), rows)
    going = sum(not one.keep for all_ in decisions.values() for one in all_)
    done = "deleted; `ah gc` frees their bytes" if yes else "would be deleted; --yes does it, for ever"
    typer.echo(f"{going} versions {done}", err=True)


def delete_tenant(
    tenant: Annotated[str, typer.Argument(metavar="TENANT")],
    confirm: Annotated[
        str, typer.Option("--confirm", metavar="TENANT", help="The name once more: it is for ever.", show_default=False)
    ] = "",
    why: Annotated[str, typer.Option("--why", metavar="TEXT", help="Kept with the name.")] = "",
    registry_url: RegistryOption = None,
    as_json: JsonOption = False,
) -> None:
    """Delete a tenant with all its versions, at once. Only its name stays, and is never issued again."""
    settings = load_settings()
    check_tenant(tenant)
    registry = open_registry(registry_url or settings.registry)
    if confirm != tenant:
        names = registry.adapters(tenant)
        versions = sum(len(registry.numbers(name)) for name in names)
        raise UsageError(
            f"{tenant} has {len(names)} adapters with {versions} versions, and deleting them is final",
            why="nothing brings them back, and the name is never issued again",
            hint=f"ah delete-tenant {tenant} --confirm {tenant}",
        )
    registry.delete_tenant(tenant, who=settings.author, why=why)
    if as_json:
        print_json({"tenant": tenant, "registry": registry.url, "why": why})
    else:
        typer.echo(f"{tenant} is deleted from {registry.url}")


def _names(registry: Registry, what: str) -> list[AdapterName]:
    if "/" in what:
        return [AdapterName.parse(what)]
    check_tenant(what)
    if names := registry.adapters(what):
        return names
    raise NotFound(f"there is no tenant {what!r} in {registry.url}", hint="ah ls")


def _pins(pins: tuple[str, ...]) -> str:
    more = f" and {len(pins) - _PINS} more" if len(pins) > _PINS else ""
    return ", ".join(pins[:_PINS]) + more or "nothing: goes"


def _seconds(text: str) -> float:
    found = re.fullmatch(r"([0-9]+)([mhd])", text)
    if found is None:
        raise UsageError(f"{text!a} is no time", why="one is a number and m, h or d", hint="--older-than 24h")
    return int(found[1]) * _UNITS[found[2]]
