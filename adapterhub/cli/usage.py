"""`ah usage`: the bill, from the database that servers write to."""

from __future__ import annotations

import csv
import sys
from datetime import UTC, datetime, timedelta
from typing import Annotated, Any

import typer

from adapterhub.cli.output import JsonOption, print_json, print_table
from adapterhub.errors import UsageError
from adapterhub.settings import load_settings

_NUMBERS = {
    "requests": "REQUESTS",
    "cancelled": "CANCELLED",
    "failed": "FAILED",
    "tokens_in": "IN",
    "tokens_out": "OUT",
    "tokens_cached": "CACHED",
    "cold_loads": "LOADS",
    "resident_seconds": "RESIDENT S",
}


def usage(
    by: Annotated[str, typer.Option("--by", metavar="WHAT", help="tenant, adapter, version, key or day.")] = "tenant",
    since: Annotated[
        str | None,
        typer.Option("--from", metavar="WHEN", help="A day or hour in UTC, or how long ago, like 30d; default 30d."),
    ] = None,
    until: Annotated[
        str | None, typer.Option("--to", metavar="WHEN", help="Up to this day or hour, itself not; default now.")
    ] = None,
    tenant: Annotated[str | None, typer.Option("--tenant", metavar="TENANT", help="This one's alone.")] = None,
    as_csv: Annotated[bool, typer.Option("--csv", help="Print comma-separated values instead of text.")] = False,
    as_json: JsonOption = False,
) -> None:
    """Show what was used: requests, tokens, loads and seconds in the engine's memory.

    Counted by the hour (UTC); servers write every 5 seconds. It reads $AH_DATABASE_URL.

    Example: ah usage --by adapter --from 2026-11-01 --to 2026-12-01 --csv
    """
    from adapterhub.serving.bill.ledger import Ledger
    from adapterhub.serving.database import default_url, open_database
    from adapterhub.serving.tenants.tenants import Tenants
    from adapterhub.serving.usage import BY, labelled, summed

    if by not in BY:
        raise UsageError(
            f"{by!a} is nothing to count by", why=f"it can be {', '.join(BY)}", hint="ah usage --by tenant"
        )
    if as_csv and as_json:
        raise UsageError("--csv and --json exclude each other", hint="ah usage --csv")
    now = datetime.now(UTC)
    begin = read_when(since, now=now) if since else now - timedelta(days=30)
    end = read_when(until, now=now) if until else now + timedelta(hours=1)  # the hour that has begun too
    if begin >= end:
        raise UsageError(f"there is nothing from {begin:%Y-%m-%d %H:%M} to {end:%Y-%m-%d %H:%M}", hint="ah usage")
    settings = load_settings()
    database = open_database(settings.database_url or default_url(settings.home))
    rows = Ledger(database).rows(since=begin, until=end, tenant=tenant) if database.exists() else []
    found = summed(rows, by=by)
    if by == "key" and found:
        known = Tenants(database).keys()
        found = labelled(found, {key.id: key.label for key in known})
    if as_json:
        print_json(found)
    elif as_csv:
        _print_csv(found, by)
    else:
        _print(found, by)


def read_when(text: str, *, now: datetime) -> datetime:
    """``2026-11-01`` or ``2026-11-01T14``, in UTC, or a span before now like ``7d``. Raises UsageError."""
    from adapterhub.serving.tenants.keys import parse_when

    when = parse_when(text, now=now)
    return when if "-" in text else now - (when - now)


def _names(by: str) -> list[str]:
    return {"version": ["adapter", "version"], "key": ["tenant", "key", "label"]}.get(by, [by])


def _print_csv(found: list[dict[str, Any]], by: str) -> None:
    out = csv.DictWriter(sys.stdout, [*_names(by), *_NUMBERS], lineterminator="\n")
    out.writeheader()
    out.writerows(found)


def _print(found: list[dict[str, Any]], by: str) -> None:
    if not found:
        typer.echo("nothing was used in this time", err=True)
        return
    head = [name.upper() for name in _names(by)] + list(_NUMBERS.values())
    print_table(head, [[_cell(entry[name]) for name in (*_names(by), *_NUMBERS)] for entry in found])


def _cell(value: Any) -> str:
    return f"{value:.0f}" if isinstance(value, float) else str(value) or "-"
