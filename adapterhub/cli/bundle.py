"""`ah bundle`, `ah import`: versions in one file, for sites without network."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from adapterhub.cli.output import BaseOption, JsonOption, RegistryOption, SignedByOption, bytes_shown, print_json
from adapterhub.errors import AlreadyExists, UsageError
from adapterhub.refs import LATEST, AdapterRef
from adapterhub.registry import Cache, Registry, open_registry
from adapterhub.registry.files import make_folders, storage_errors
from adapterhub.registry.locks import locked
from adapterhub.registry.signing import Signers
from adapterhub.settings import load_settings

if TYPE_CHECKING:
    from adapterhub.base import BaseModel
    from adapterhub.registry.moving.bundle_index import Bundled, Index
    from adapterhub.registry.moving.bundles import Opened


def bundle(
    refs: Annotated[list[str], typer.Argument(metavar="TENANT/ADAPTER[@VERSION]…", help="One or more versions.")],
    to: Annotated[Path, typer.Option("--to", metavar="FILE", help="A new file, like support.tar.")],
    with_base: Annotated[bool, typer.Option("--with-base", help="Pack the base model (--base) too.")] = False,
    base: BaseOption = None,
    require_signed_by: SignedByOption = None,
    registry_url: RegistryOption = None,
    as_json: JsonOption = False,
) -> None:
    """Pack versions into one file, with signatures and evaluations; the same versions make the same bytes.

    Example: ah bundle acme/support@prod --with-base --base Qwen/Qwen3-0.6B --to support.tar
    """
    from adapterhub.registry.moving import bundles

    settings = load_settings()
    base = base or (settings.base if with_base else None)
    if with_base != (base is not None):
        raise UsageError(
            "--with-base needs --base" if with_base else "--base is for --with-base alone",
            hint=f"ah bundle {refs[0]} --with-base --base {base or 'BASE'} --to {to}",
        )
    registry = open_registry(registry_url or settings.registry)
    signers = Signers.read(require_signed_by or settings.require_signed_by)
    versions = list({str(one): one for one in map(AdapterRef.parse, refs)}.values())
    with bytes_shown("packing", quiet=as_json) as progress:
        index = bundles.write(
            to.expanduser().absolute(),
            [_bundled(registry, ref) for ref in versions],
            files=Cache(settings.cache, registry, signers=signers).fetch,
            base=_find(base) if base else None,
            progress=progress,
        )
    if as_json:
        print_json({"path": str(to), **_as_json(index)})
    else:
        packed = [str(one.record.ref) for one in index.versions] + ([f"base {index.base.name}"] if index.base else [])
        typer.echo(f"{to}: {', '.join(packed)}, {index.size} bytes")


def import_(
    file: Annotated[Path, typer.Argument(metavar="FILE", help="What `ah bundle` made.")],
    same_number: Annotated[
        bool, typer.Option("--same-number", help="Keep the numbers, or refuse; default: the next ones.")
    ] = False,
    channels: Annotated[
        bool, typer.Option("--channels", help="Point the channels that were bundled (@prod) at the versions.")
    ] = False,
    base_to: Annotated[
        Path | None,
        typer.Option("--base-to", metavar="DIR", help="Put the base here; default: leave it.", show_default=False),
    ] = None,
    require_signed_by: SignedByOption = None,
    registry_url: RegistryOption = None,
    as_json: JsonOption = False,
) -> None:
    """Publish what is in a bundle: every byte is checked first, and the digests stay.

    Example: ah import support.tar --require-signed-by release.pub
    """
    from adapterhub.registry.moving import bundles

    settings = load_settings()
    signers = Signers.read(require_signed_by or settings.require_signed_by)
    target = open_registry(registry_url or settings.registry)
    index = bundles.read_index(file)
    if base_to is not None:
        base_to = base_to.expanduser().absolute()
        if index.base is None:
            raise UsageError(
                f"{file} brings no base", why="it was made without --with-base", hint="leave --base-to out"
            )
        if base_to.exists():
            raise AlreadyExists(f"{base_to} is there already", why="nothing is overwritten", hint="name a new folder")
    work = (base_to.parent if base_to else settings.cache) / f".bundle.{index.id[:32]}"
    with locked(work.with_name(work.name + ".lock")):
        shutil.rmtree(work, ignore_errors=True)
        try:
            with bytes_shown("unpacking", quiet=as_json) as progress:
                bundles.unpack(file, work, signers=signers, with_base=base_to is not None, progress=progress)
            landed = bundles.bring(index, work, target, same_number=same_number, channels=channels, who=settings.author)
            if base_to is not None and index.base is not None:
                with storage_errors(f"{base_to} cannot be written"):
                    make_folders(base_to.parent)
                    bundles.base_folder(work, index.base).rename(base_to)
        finally:
            shutil.rmtree(work, ignore_errors=True)
    if as_json:
        rows = [{"ref": str(one.record.ref), "digest": one.record.digest, "new": one.is_new} for one in landed]
        print_json({"registry": target.url, "versions": rows, "base": str(base_to) if base_to else None})
        return
    for one in landed:
        typer.echo(f"{one.record.ref}  {one.record.digest}" + ("" if one.is_new else "  was there"))
    if index.base is not None and base_to is None:
        typer.echo(f"the base {index.base.name} stays in {file}: --base-to DIR takes it out", err=True)


def open_bundle(file: Path, home: Path, *, signers: Signers, registry: str | None) -> Opened:
    """A bundle as a registry, unpacked below ``home`` once. Raises UsageError beside ``registry``."""
    from adapterhub.registry.moving.bundles import opened

    if registry is not None:
        raise UsageError("--bundle and --registry name two registries", hint="leave one of them out")
    with bytes_shown("unpacking") as progress:
        return opened(file, home / "bundles", signers=signers, progress=progress)


def _bundled(registry: Registry, ref: AdapterRef) -> Bundled:
    from adapterhub.registry.moving.bundle_index import Bundled
    from adapterhub.registry.moving.copying import original

    channel = None if ref.channel == LATEST else ref.channel
    return Bundled(original(registry, registry.resolve(ref)), channel)


def _find(base: str) -> BaseModel:
    from adapterhub.base import find_base

    return find_base(base)


def _as_json(index: Index) -> dict[str, Any]:
    versions = [{"ref": str(one.record.ref), "digest": one.record.digest} for one in index.versions]
    return {"versions": versions, "base": index.base.name if index.base else None, "size": index.size, "id": index.id}
