"""`ah registry doctor`: does a store keep what a registry promises?"""

from __future__ import annotations

from dataclasses import asdict
from typing import Annotated

import typer

from adapterhub.cli.output import JsonOption, print_json, print_table, say
from adapterhub.settings import load_settings

app = typer.Typer(help="Look after registries.", no_args_is_help=True)


@app.callback()
def _group() -> None:
    pass  # typer makes a group of one command only so


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
