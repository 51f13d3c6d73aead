"""`ah sign`, `ah signatures`: who stands for a version, and whether that is true."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from adapterhub.cli.output import (
    JsonOption,
    RegistryOption,
    SignedByOption,
    key_password,
    print_json,
    print_table,
)
from adapterhub.errors import Untrusted
from adapterhub.manifest import Record
from adapterhub.refs import AdapterRef
from adapterhub.registry import open_registry
from adapterhub.registry.base import Signature
from adapterhub.registry.signing import Signers
from adapterhub.registry.signing import sign as sign_version
from adapterhub.registry.signing import verify as verify_signature
from adapterhub.settings import load_settings

RefArgument = Annotated[
    str, typer.Argument(metavar="TENANT/ADAPTER[@VERSION]", help="Default: the newest active version.")
]


def sign(
    ref: RefArgument,
    key: Annotated[Path, typer.Option("--key", metavar="KEY", help="A private key (PEM); $AH_KEY_PASSWORD opens it.")],
    registry_url: RegistryOption = None,
    as_json: JsonOption = False,
) -> None:
    """Sign a version: its digest, so the signature holds in every registry it is copied to."""
    registry = open_registry(registry_url or load_settings().registry)
    record = registry.resolve(AdapterRef.parse(ref)).record
    signature = sign_version(registry, record, key=key, password=key_password())
    if as_json:
        print_json({"ref": str(record.ref), "digest": record.digest, "key": signature.key})
    else:
        typer.echo(f"{record.ref}  {record.digest}  signed with {signature.key}")


def signatures(
    ref: RefArgument,
    require_signed_by: SignedByOption = None,
    registry_url: RegistryOption = None,
    as_json: JsonOption = False,
) -> None:
    """Show who signed a version, and check it with the keys that are required: exit 2 where none of them did."""
    settings = load_settings()
    signers = Signers.read(require_signed_by or settings.require_signed_by)
    registry = open_registry(registry_url or settings.registry)
    record = registry.resolve(AdapterRef.parse(ref)).record
    found = registry.signatures(record)
    rows = [_row(record, signature, signers) for signature in found]
    if as_json:
        print_json({"ref": str(record.ref), "digest": record.digest, "signatures": rows})
    elif rows:
        print_table(["KEY", "CHECKED"], [[row["key"], row["checked"]] for row in rows])
    else:
        typer.echo(f"nobody signed {record.ref}", err=True)
    signers.check(record, found)


def _row(record: Record, signature: Signature, signers: Signers) -> dict[str, Any]:
    key = next((key for key in signers.keys if key.id == signature.key), None)
    if key is None:
        return {"key": signature.key, "good": None, "checked": "no: give its public key with --require-signed-by"}
    try:
        verify_signature(record.manifest, signature, key=key)
    except Untrusted as error:
        return {"key": signature.key, "good": False, "checked": error.why}
    return {"key": signature.key, "good": True, "checked": f"good, by {key.path.name}"}
