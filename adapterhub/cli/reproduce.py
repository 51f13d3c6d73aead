"""`ah reproduce`: a version is trained again from its own lineage, and the weights are compared byte by byte."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from adapterhub.cli.output import BaseOption, JsonOption, RegistryOption, print_json, say
from adapterhub.errors import BaseMismatch, DataError, RunFailed, Unsupported
from adapterhub.manifest import Record
from adapterhub.peftdir import WEIGHTS
from adapterhub.refs import AdapterRef
from adapterhub.registry import Cache, open_registry
from adapterhub.runrecord import TRAINING
from adapterhub.settings import load_settings

if TYPE_CHECKING:
    from adapterhub.trainers import Prepared, Reading


def reproduce(
    context: typer.Context,
    ref: Annotated[str, typer.Argument(metavar="TENANT/ADAPTER[@VERSION]", help="Default: the newest active version.")],
    data: Annotated[
        list[Path] | None,
        typer.Option(
            "--data", metavar="FILE|DIR", help="The data files, or their folder; S3 and Hub data are fetched again."
        ),
    ] = None,
    base: BaseOption = None,
    folder: Annotated[
        Path | None, typer.Option("--out", metavar="DIR", help="Keep the run there; default: it is removed.")
    ] = None,
    registry_url: RegistryOption = None,
    as_json: JsonOption = False,
) -> None:
    """Train a version again from its lineage, and say whether the weights are the same bytes."""
    from adapterhub.cli.progress import shown
    from adapterhub.trainers import train
    from adapterhub.trainers.lineage import changes, file_sha256
    from adapterhub.trainers.run import environment

    settings = load_settings()
    registry = open_registry(registry_url or settings.registry)
    record = registry.resolve(AdapterRef.parse(ref)).record
    _check_can_be_reproduced(record)
    adapter = Cache(settings.cache, registry).fetch(record)
    out = folder or Path(context.with_resource(tempfile.TemporaryDirectory(prefix="ah-reproduce-"))) / "run"
    reading, prepared = _prepared(record, adapter, base or settings.base, data or [], out, registry_url)
    differences = changes(record.manifest.lineage.environment, environment())
    for difference in differences:
        say(f"[yellow]not as it was:[/] {difference}")
    with shown() as listener:
        result = train(reading, prepared, on_event=listener)
    wanted = next(file.sha256 for file in record.manifest.files if file.path == WEIGHTS)
    found = file_sha256(result.adapter / WEIGHTS)
    if as_json:
        print_json({"ref": str(record.ref), "same": found == wanted, "published": wanted, "retrained": found})
    if found != wanted:
        raise RunFailed(
            f"{record.ref} trained again has other weights",
            why=f"{found[:12]} instead of {wanted[:12]}; "
            + ("; ".join(differences) or "the packages are the same: another processor adds in another order"),
            hint=f"ah reproduce {record.ref} --out DIR keeps the run; compare its metrics.jsonl",
        )
    say(f"[bold green]the same weights:[/] {record.ref} is {wanted}")


def _check_can_be_reproduced(record: Record) -> None:
    if record.manifest.lineage.config_sha256 and any(file.path == TRAINING for file in record.manifest.files):
        return
    raise Unsupported(
        f"{record.ref} does not say how it was trained",
        why=f"it has no {TRAINING}: it was made by another program, by merging, or by an older AdapterHub",
        hint=f"ah show {record.ref}",
    )


def _prepared(
    record: Record, adapter: Path, base: str | None, data: list[Path], out: Path, registry_url: str | None
) -> tuple[Reading, Prepared]:
    from dataclasses import replace

    from adapterhub.cli.train import version_finder
    from adapterhub.trainers import prepare, read_config, read_yaml
    from adapterhub.trainers.lineage import at_hand, data_hashes

    manifest = record.manifest
    reading = read_config(read_yaml(adapter / TRAINING))
    if (reading.config.lora_model_dir or "").startswith("sha256:"):
        raise Unsupported(
            f"{record.ref} went on from an adapter that was never published",
            why=f"its weights had the {reading.config.lora_model_dir}; only a version can be found again",
            hint="publish what a training goes on from, and name it: ah train --from acme/support@3",
        )
    name = base or reading.config.base_model
    reading = replace(reading, config=at_hand(reading.config, base=name, data=data, output_dir=out))
    prepared = prepare(reading.config, find_version=version_finder(registry_url))
    if manifest.base is not None and manifest.base.match(prepared.base.fingerprint) != "exact":
        raise BaseMismatch(
            f"{record.ref} was trained on another base than {prepared.base.name}",
            why="the same weights come from the same base only, in the same data type",
            hint=f"use --base {manifest.base.name}",
        )
    if data_hashes(prepared) != manifest.lineage.data_sha256:
        raise DataError(
            f"the data is not what {record.ref} was trained on",
            why="a file's sha256 differs from the one in its lineage",
            hint="bring the files back as they were",
        )
    return reading, prepared
