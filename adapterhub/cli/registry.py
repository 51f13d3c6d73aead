"""`ah registry`: does a store keep what a registry promises, and its listing snapshots."""

from __future__ import annotations

from dataclasses import asdict
from typing import Annotated

import typer

from adapterhub.cli.output import JsonOption, RegistryOption, print_json, print_table, say
from adapterhub.errors import NotFound, Unsupported
from adapterhub.settings import load_settings

app = typer.Typer(help="Look after registries.", no_args_is_help=True)


@app.command("doctor")
def doctor(
    url: Annotated[
        str | None,
        typer.Argument(
            metavar="[URL]", help="file:///…, s3://bucket/prefix; default $AH_REGISTRY.", show_default=False
        ),
    ] = None,
    as_json: JsonOption = False,
) -> None:
    """Try every promise that a store must keep, with keys that are removed again.

    The first publish into a registry does the same, and refuses a store that breaks one.

    Example: ah registry doctor 's3://models/team?endpoint=https://minio.example'
    """
    from adapterhub.registry import open_store
    from adapterhub.registry.doctor import notes, prove
    from adapterhub.registry.identity import found

    store = open_store(url or load_settings().registry)
    proofs = prove(store)
    identity = found(store)
    remarks = notes(store)
    if as_json:
        plain = {
            "registry": store.url,
            "id": identity.id if identity else None,
            "proofs": [asdict(proof) for proof in proofs],
            "notes": remarks,
        }
        print_json(plain)
        return
    print_table(("PROMISE", "SECONDS"), [(proof.promise, f"{proof.seconds:.3f}") for proof in proofs])
    for remark in remarks:
        say(f"note: {remark}")
    if identity is None:
        say("note: no registry is here yet; the first `ah publish` makes it")


@app.command("reindex")
def reindex(
    tenants: Annotated[
        list[str] | None, typer.Argument(metavar="[TENANT]...", help="Default: all.", show_default=False)
    ] = None,
    registry_url: RegistryOption = None,
    as_json: JsonOption = False,
) -> None:
    """Write new listing snapshots, which `ah ls` and `ah search` read: for those that nobody trusts any more.

    They come and are renewed by themselves; nothing but lists looks into them.
    """
    from adapterhub.registry import ObjectRegistry, open_registry

    registry = open_registry(registry_url or load_settings().registry)
    if not isinstance(registry, ObjectRegistry):
        raise Unsupported(f"{registry.url} has no listing snapshots", why="the Hub lists its repositories itself")
    known = registry.tenants()
    if strange := [tenant for tenant in tenants or () if tenant not in known]:
        raise NotFound(f"there is no tenant {strange[0]!r} in {registry.url}", hint="ah ls")
    counts = {tenant: registry.reindex(tenant) for tenant in tenants or known}
    if as_json:
        print_json(counts)
        return
    print_table(("TENANT", "ADAPTERS"), [(tenant, str(count)) for tenant, count in counts.items()])
