"""`ah key`: API keys. The text of a key is printed once, on stdout, and is stored nowhere."""

from __future__ import annotations

from datetime import UTC, datetime
from typing import TYPE_CHECKING, Annotated, Any

import typer

from adapterhub.cli.output import JsonOption, print_json
from adapterhub.cli.tenant import (
    AdaptersOption,
    ConcurrencyOption,
    ContextOption,
    OutputOption,
    QueueOption,
    RequestsOption,
    TokensOption,
    ends_text,
    open_tenants,
    plain_key,
    print_keys,
    read_limits,
)
from adapterhub.serving.tenants.callers import NO_LIMITS

if TYPE_CHECKING:
    from adapterhub.serving.tenants.keys import Key, Minted

app = typer.Typer(help="API keys of tenants: create, list, rotate, revoke, expire.", no_args_is_help=True)

KeyArgument = Annotated[str, typer.Argument(metavar="ID", help="As in `ah key ls`; a whole key will do.")]


@app.command("create")
def create(
    tenant: Annotated[str, typer.Argument(metavar="TENANT")],
    scope: Annotated[
        list[str] | None,
        typer.Option("--scope", help="inference, channels (move its own) or admin; may be repeated.", metavar="SCOPE"),
    ] = None,
    label: Annotated[str, typer.Option("--label", metavar="TEXT", help="What it is for.")] = "",
    expires: Annotated[
        str | None, typer.Option("--expires", metavar="WHEN", help="Like 90d, 12h or 2027-01-31; default never.")
    ] = None,
    requests_per_minute: RequestsOption = None,
    tokens_per_minute: TokensOption = None,
    concurrency: ConcurrencyOption = None,
    queue: QueueOption = None,
    context: ContextOption = None,
    output: OutputOption = None,
    adapters: AdaptersOption = None,
    as_json: JsonOption = False,
) -> None:
    """Make a key. It is shown now and never again.

    Example: ah key create acme --label website --expires 90d
    """
    from adapterhub.serving.tenants.keys import parse_when

    limits = read_limits(NO_LIMITS, locals())
    now = datetime.now(UTC)
    ends = parse_when(expires, now=now) if expires else None
    if ends is not None and ends <= now:
        typer.echo("this key has expired already", err=True)
    scopes: Any = scope or ["inference"]
    _show(*open_tenants().add_key(tenant, scopes=scopes, label=label, limits=limits, expires=ends), as_json=as_json)


@app.command("ls")
def ls(
    tenant: Annotated[str | None, typer.Argument(metavar="[TENANT]", show_default=False)] = None,
    as_json: JsonOption = False,
) -> None:
    """List keys, without their secrets."""
    found = open_tenants().keys(tenant)
    if as_json:
        print_json([plain_key(key) for key in found])
    else:
        print_keys(found)


@app.command("rotate")
def rotate(
    key: KeyArgument,
    overlap: Annotated[
        str, typer.Option("--overlap", metavar="SPAN", help="How long the old key goes on, like 24h; 0s ends it now.")
    ] = "24h",
    as_json: JsonOption = False,
) -> None:
    """Make a new key like another, which ends after the overlap."""
    from adapterhub.serving.tenants.keys import parse_when

    until = parse_when(overlap, now=datetime.now(UTC))
    minted, made = open_tenants().rotate(_id(key), old_until=until)
    typer.echo(f"{_id(key)} goes on until {until.isoformat(timespec='seconds')}", err=True)
    _show(minted, made, as_json=as_json)


@app.command("revoke")
def revoke(key: KeyArgument, as_json: JsonOption = False) -> None:
    """End a key now and for ever. Running servers refuse it within seconds."""
    _told(open_tenants().revoke(_id(key)), as_json=as_json)


@app.command("expire")
def expire(
    key: KeyArgument,
    when: Annotated[str, typer.Argument(metavar="WHEN", help="Like 30d or 2027-01-31; never takes it back.")],
    as_json: JsonOption = False,
) -> None:
    """Let a key end at a moment."""
    from adapterhub.serving.tenants.keys import parse_when

    ends = None if when == "never" else parse_when(when, now=datetime.now(UTC))
    _told(open_tenants().expire(_id(key), ends), as_json=as_json)


def _id(text: str) -> str:
    """Of an id, or of a whole key."""
    parts = text.split("_")
    return parts[1] if len(parts) > 1 and parts[0] == "ah" else text


def _show(minted: Minted, key: Key, *, as_json: bool) -> None:
    if as_json:
        print_json({"key": minted.text, **plain_key(key)})
        return
    ends = f"until {key.expires}" if key.expires else "without an end"
    typer.echo(f"key {key.id} of {key.tenant}, {', '.join(sorted(key.scopes))}, {ends}.", err=True)
    typer.echo("It is shown this once; keep it where you keep passwords.", err=True)
    typer.echo(minted.text)


def _told(key: Key, *, as_json: bool) -> None:
    if as_json:
        print_json(plain_key(key))
    else:
        typer.echo(f"{key.id} of {key.tenant}: {ends_text(key)}")
