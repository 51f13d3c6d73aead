"""`ah pull`: a version's files on this machine, verified, or merged into its base."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from adapterhub.cli.output import BaseOption, JsonOption, RegistryOption, SignedByOption, bytes_shown, print_json
from adapterhub.errors import Unsupported, UsageError
from adapterhub.manifest import Record
from adapterhub.refs import AdapterRef
from adapterhub.registry import Cache, fetch_folder, open_registry
from adapterhub.registry.signing import Signers
from adapterhub.settings import load_settings


def pull(
    ref: Annotated[str, typer.Argument(metavar="TENANT/ADAPTER[@VERSION]", help="Default: the newest active version.")],
    to: Annotated[
        Path | None, typer.Option("--to", metavar="DIR", help="A new folder; default: the cache.", show_default=False)
    ] = None,
    merged: Annotated[bool, typer.Option("--merged", help="Merge it into --base: a standalone model in --to.")] = False,
    base: BaseOption = None,
    require_signed_by: SignedByOption = None,
    registry_url: RegistryOption = None,
    as_json: JsonOption = False,
) -> None:
    """Fetch a version: every byte is checked before it is where you look."""
    settings = load_settings()
    registry = open_registry(registry_url or settings.registry)
    if base is not None and not merged:
        raise UsageError("--base is for --merged alone", hint=f"ah pull {ref} --merged --base {base} --to DIR")
    version = registry.resolve(AdapterRef.parse(ref))
    if version.status == "deprecated":
        typer.echo(f"{version.record.ref} is deprecated: {version.why or 'no reason given'}", err=True)
    signers = Signers.read(require_signed_by or settings.require_signed_by)
    cache = Cache(settings.cache, registry, signers=signers)
    if merged:
        folder = _merge(cache, version.record, to=to, base=base or settings.base)
    elif to is not None:
        folder = to.expanduser().absolute()
        with bytes_shown("pulling", quiet=as_json) as progress:
            fetch_folder(registry, version.record, folder, signers=signers, progress=progress)
    else:
        with bytes_shown("pulling", quiet=as_json) as progress:
            folder = cache.fetch(version.record, progress=progress)
    if as_json:
        record = version.record
        print_json({"ref": str(record.ref), "digest": record.digest, "path": str(folder), "merged": merged})
    else:
        typer.echo(str(folder))


def _merge(cache: Cache, record: Record, *, to: Path | None, base: str | None) -> Path:
    if to is None or base is None:
        raise UsageError(
            "a merged model needs a folder and a base" if to is None else "merging needs the base",
            why="nothing says where" if to is None else "neither --base nor $AH_BASE names one",
            hint=f"ah pull {record.ref} --merged --base {base or 'BASE'} --to {to or 'DIR'}",
        )
    if record.verdicts.merge.answer == "no":
        raise Unsupported(f"{record.ref} cannot be merged", why=record.verdicts.merge.reason)
    from adapterhub.base import find_base
    from adapterhub.export import export_model

    model = find_base(base)
    if record.manifest.base is not None:
        note = model.check(record.manifest.base, what=str(record.ref))
        if note:
            typer.echo(f"note: {note}", err=True)
    export_model(cache.fetch(record), model, to, record=record)
    return to
