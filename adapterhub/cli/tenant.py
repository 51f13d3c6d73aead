"""`ah tenant`: who may use a server, what they share, and how much they may take."""

from __future__ import annotations

from collections.abc import Collection, Iterable
from dataclasses import asdict, fields, replace
from typing import TYPE_CHECKING, Annotated, Any

import typer

from adapterhub.cli.output import JsonOption, print_json, print_table
from adapterhub.errors import UsageError
from adapterhub.refs import AdapterName
from adapterhub.serving.tenants.callers import NO_LIMITS, Limits
from adapterhub.settings import load_settings

if TYPE_CHECKING:
    from adapterhub.serving.tenants.keys import Key, Share, Tenant
    from adapterhub.serving.tenants.tenants import Tenants

app = typer.Typer(help="Tenants of a server: create, limit, share adapters between them.", no_args_is_help=True)

TenantArgument = Annotated[str, typer.Argument(metavar="TENANT")]
BaseFlag = Annotated[bool | None, typer.Option("--base/--no-base", help="Whether it may ask the base itself.")]
WeightOption = Annotated[
    float | None, typer.Option("--weight", help="Share of the engine where tenants compete; 1 is usual.")
]


def _limit(flag: str, text: str) -> Any:
    return typer.Option(f"--{flag}", metavar="N|none", help=text, rich_help_panel="Limits", show_default=False)


RequestsOption = Annotated[str | None, _limit("requests-per-minute", "Requests a minute.")]
TokensOption = Annotated[str | None, _limit("tokens-per-minute", "Tokens a minute, of prompts and answers.")]
ConcurrencyOption = Annotated[str | None, _limit("concurrency", "Requests at once.")]
QueueOption = Annotated[str | None, _limit("queue", "Requests that wait for their turn.")]
ContextOption = Annotated[str | None, _limit("context", "Tokens of a prompt with its answer.")]
OutputOption = Annotated[str | None, _limit("output", "Tokens of one answer.")]
AdaptersOption = Annotated[str | None, _limit("adapters", "Adapter versions loaded at once.")]


@app.command("create")
def create(
    name: TenantArgument,
    base: BaseFlag = None,
    weight: WeightOption = None,
    requests_per_minute: RequestsOption = None,
    tokens_per_minute: TokensOption = None,
    concurrency: ConcurrencyOption = None,
    queue: QueueOption = None,
    context: ContextOption = None,
    output: OutputOption = None,
    adapters: AdaptersOption = None,
    as_json: JsonOption = False,
) -> None:
    """Create a tenant; then make it a key.

    Example: ah tenant create acme --requests-per-minute 600
    """
    from adapterhub.serving.tenants.keys import Tenant

    limits = read_limits(NO_LIMITS, locals())
    tenant = open_tenants().add(_changed(Tenant(name), base=base, weight=weight, limits=limits))
    _print(tenant, as_json=as_json)
    typer.echo(f"next: ah key create {name}", err=True)


@app.command("set")
def set_tenant(
    name: TenantArgument,
    base: BaseFlag = None,
    weight: WeightOption = None,
    requests_per_minute: RequestsOption = None,
    tokens_per_minute: TokensOption = None,
    concurrency: ConcurrencyOption = None,
    queue: QueueOption = None,
    context: ContextOption = None,
    output: OutputOption = None,
    adapters: AdaptersOption = None,
    as_json: JsonOption = False,
) -> None:
    """Change what is named, and nothing else. Running servers follow within seconds.

    Example: ah tenant set acme --tokens-per-minute 100000 --concurrency none
    """
    tenants = open_tenants()
    present = tenants.tenant(name)
    limits = read_limits(present.limits, locals())
    changed = _changed(present, base=base, weight=weight, limits=limits)
    if changed == present:
        raise UsageError("nothing to change was named", hint="ah tenant set --help")
    tenants.change(changed)
    _print(changed, as_json=as_json)


@app.command("ls")
def ls(as_json: JsonOption = False) -> None:
    """List all tenants."""
    found = open_tenants().list()
    if as_json:
        print_json([asdict(tenant) for tenant in found])
        return
    rows = [[t.name, "yes" if t.base else "no", f"{t.weight:g}", limits_text(t.limits), t.created] for t in found]
    print_table(["TENANT", "BASE", "WEIGHT", "LIMITS", "CREATED"], rows)


@app.command("show")
def show(name: TenantArgument, as_json: JsonOption = False) -> None:
    """Show a tenant, its keys and what is shared with it and by it."""
    tenants = open_tenants()
    tenant = tenants.tenant(name)
    keys, shares = tenants.keys(name), tenants.shares()
    data = {**asdict(tenant), "keys": [plain_key(key) for key in keys], **_shared(name, shares)}
    if as_json:
        print_json(data)
        return
    typer.echo(f"{name}: base {'yes' if tenant.base else 'no'}, weight {tenant.weight:g}, {limits_text(tenant.limits)}")
    for text, entries in (("uses", data["uses"]), ("shares", data["shares"])):
        for entry in entries:
            typer.echo(f"  {text} {entry}")
    print_keys(keys)


@app.command("delete")
def delete(
    name: TenantArgument, yes: Annotated[bool, typer.Option("--yes", help="Yes, with all its keys.")] = False
) -> None:
    """Delete a tenant with its keys and shares. Its adapters stay in the registry."""
    tenants = open_tenants()
    count = len(tenants.keys(name))
    if not yes:
        raise UsageError(
            f"deleting {name} ends its {count} keys", why="it cannot be undone", hint=f"ah tenant delete {name} --yes"
        )
    tenants.remove(name)
    typer.echo(f"{name} is deleted, and {count} keys with it")


@app.command("share")
def share(
    adapter: Annotated[str, typer.Argument(metavar="TENANT/ADAPTER")],
    tenant: Annotated[str, typer.Argument(metavar="WITH", help="The tenant that may use it.")],
) -> None:
    """Let another tenant use an adapter, all versions and channels of it.

    Example: ah tenant share acme/support globex
    """
    name = AdapterName.parse(adapter)
    if name.tenant == tenant:
        raise UsageError(f"{name} is {tenant}'s own", why="it may use that anyway")
    open_tenants().share(name, tenant)
    typer.echo(f"{tenant} may use {name}")


@app.command("unshare")
def unshare(
    adapter: Annotated[str, typer.Argument(metavar="TENANT/ADAPTER")],
    tenant: Annotated[str, typer.Argument(metavar="WITH")],
) -> None:
    """End that."""
    name = AdapterName.parse(adapter)
    open_tenants().unshare(name, tenant)
    typer.echo(f"{tenant} may not use {name} any more")


def open_tenants() -> Tenants:
    """The tenants of the database that is set."""
    from adapterhub.serving.database import default_url, open_database
    from adapterhub.serving.tenants.tenants import Tenants

    settings = load_settings()
    database = open_database(settings.database_url or default_url(settings.home))
    if not database.exists():
        with database.write():
            pass  # the first use makes it
    return Tenants(database)


def read_limits(present: Limits, typed: dict[str, Any]) -> Limits:
    """``present`` with what was typed: a number, or ``none`` for no limit. Raises UsageError."""
    given = {f.name: typed[f.name] for f in fields(Limits) if typed[f.name] is not None}
    return replace(present, **{name: _number(name, text) for name, text in given.items()})


def _number(name: str, text: str) -> int | None:
    if text.lower() == "none":
        return None
    try:
        return int(text.replace("_", ""))
    except ValueError as error:
        flag = f"--{name.replace('_', '-')}"
        raise UsageError(f"{flag} {text!a} is no number", why="a limit is a whole number, or none") from error


def limits_text(limits: Limits) -> str:
    """What is set, for people."""
    named = {name.replace("_", "-"): value for name, value in asdict(limits).items() if value is not None}
    return ", ".join(f"{name} {value}" for name, value in named.items()) or "no limits"


def plain_key(key: Key) -> dict[str, Any]:
    """A key for ``--json``: all but its hash."""
    values = {name: getattr(key, name) for name in ("id", "tenant", "label", "created", "expires", "revoked")}
    return values | {"scopes": sorted(key.scopes), "limits": asdict(key.limits)}


def print_keys(keys: Iterable[Key]) -> None:
    head = ["ID", "TENANT", "SCOPES", "LABEL", "CREATED", "ENDS", "LIMITS"]
    rows = [
        [k.id, k.tenant, ",".join(sorted(k.scopes)), k.label, k.created, ends_text(k), limits_text(k.limits)]
        for k in keys
    ]
    print_table(head, rows)


def ends_text(key: Key) -> str:
    """When it ends, or did."""
    return f"revoked {key.revoked}" if key.revoked else key.expires or "never"


def _changed(tenant: Tenant, *, base: bool | None, weight: float | None, limits: Limits) -> Tenant:
    if weight is not None and not 0.01 <= weight <= 100:  # NaN is outside too
        raise UsageError(f"--weight {weight} is no weight", why="it is between 0.01 and 100")
    return replace(
        tenant,
        base=tenant.base if base is None else base,
        weight=tenant.weight if weight is None else weight,
        limits=limits,
    )


def _shared(tenant: str, shares: Collection[Share]) -> dict[str, list[str]]:
    return {
        "uses": [str(s.adapter) for s in shares if s.tenant == tenant],
        "shares": [f"{s.adapter} with {s.tenant}" for s in shares if s.adapter.tenant == tenant],
    }


def _print(tenant: Tenant, *, as_json: bool) -> None:
    if as_json:
        print_json(asdict(tenant))
    else:
        base = "with the base" if tenant.base else "without the base"
        typer.echo(f"{tenant.name}: {base}, weight {tenant.weight:g}, {limits_text(tenant.limits)}")
