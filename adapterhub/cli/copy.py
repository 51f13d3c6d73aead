"""`ah copy`, `ah mirror`: versions from one registry to another."""

from __future__ import annotations

from typing import Annotated

import typer

from adapterhub.cli.output import JsonOption, RegistryOption, SignedByOption, bytes_shown, print_json
from adapterhub.errors import Conflict
from adapterhub.manifest import to_plain
from adapterhub.refs import AdapterName, AdapterRef, check_channel
from adapterhub.registry import Cache, open_registry
from adapterhub.registry.signing import Signers
from adapterhub.settings import load_settings


def copy(
    ref: Annotated[str, typer.Argument(metavar="TENANT/ADAPTER[@VERSION]", help="In --registry.")],
    to: Annotated[str, typer.Argument(metavar="REGISTRY", help="Where it goes: file:///…, s3://…, hf://….")],
    name: Annotated[
        str | None, typer.Option("--name", metavar="TENANT/ADAPTER", help="What it is called there; default: the same.")
    ] = None,
    same_number: Annotated[
        bool, typer.Option("--same-number", help="Keep the number, or refuse; default: the next one there.")
    ] = False,
    channel: Annotated[
        str | None, typer.Option("--channel", metavar="NAME", help="Then point this channel there at it.")
    ] = None,
    require_signed_by: SignedByOption = None,
    registry_url: RegistryOption = None,
    as_json: JsonOption = False,
) -> None:
    """Copy a version to another registry: same bytes, same digest, with labels, evaluations and signatures.

    Copied again, it stays one version: what is there is found by its digest.

    Example: ah copy acme/support@canary s3://prod --channel prod
    """
    from adapterhub.registry.moving.copying import land, original, point

    settings = load_settings()
    chosen = AdapterName.parse(name) if name else None
    if channel is not None:
        check_channel(channel)
    signers = Signers.read(require_signed_by or settings.require_signed_by)
    source, target = open_registry(registry_url or settings.registry), open_registry(to)
    version = source.resolve(AdapterRef.parse(ref))
    record = version.record
    signers.require(source, record)
    number = record.version if same_number else None
    with bytes_shown("copying", quiet=as_json) as progress:
        landed = land(
            original(source, version),
            Cache(settings.cache, source, signers=signers).fetch,
            target,
            name=chosen,
            number=number,
            progress=progress,
        )
    if channel is not None:
        point(target, landed.record, channel, who=settings.author)
    if as_json:
        found = {"ref": str(landed.record.ref), "digest": record.digest, "new": landed.is_new, "channel": channel}
        print_json(found | {"from": str(record.ref), "registry": target.url})
    else:
        typer.echo(f"{landed.record.ref}  {record.digest}" + ("" if landed.is_new else "  was there"))


def mirror(
    source: Annotated[str, typer.Argument(metavar="SOURCE", help="The registry that is followed.")],
    target: Annotated[str, typer.Argument(metavar="TARGET", help="The registry that follows, and nothing else does.")],
    tenants: Annotated[
        list[str] | None, typer.Argument(metavar="[TENANT…]", help="Default: all.", show_default=False)
    ] = None,
    require_signed_by: SignedByOption = None,
    as_json: JsonOption = False,
) -> None:
    """Bring one registry to where another is: versions with their numbers, statuses and channels. One way.

    Only what is missing is sent. An adapter whose target has something else is refused, and the command exits with 2.
    """
    from adapterhub.registry.moving.mirror import mirror as follow

    settings = load_settings()
    signers = Signers.read(require_signed_by or settings.require_signed_by)
    here, there = open_registry(source), open_registry(target)
    cache = Cache(settings.cache / "mirror", here, signers=signers)
    with bytes_shown("mirroring", quiet=as_json) as progress:
        report = follow(
            here,
            there,
            tenants or None,
            files=cache.fetch,
            done=lambda version: cache.forget(version.record),
            progress=progress,
        )
    if as_json:
        print_json(to_plain(report))
    else:
        for note in report.notes:
            typer.echo(f"note: {note}", err=True)
        typer.echo(
            f"{report.versions} versions, {report.statuses} statuses, {report.channels} channels, "
            f"{report.evaluations} evaluations and {report.signatures} signatures brought to {there.url}"
        )
    if report.refused:
        raise Conflict(
            f"{there.url} has diverged",
            why="; ".join(report.refused),
            hint=f"mirror into a registry of its own: ah mirror {source} OTHER",
        )
