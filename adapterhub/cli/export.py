"""`ah export`, `ah verify`: a version or an adapter directory merged into its base; the result checked again later."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from adapterhub import peftdir
from adapterhub.cli.gguf import check_gguf_flags, write_gguf
from adapterhub.cli.output import BaseOption, BundleOption, JsonOption, RegistryOption, SignedByOption, err, print_json
from adapterhub.cli.sizes import parse_size
from adapterhub.errors import InvalidName, Untrusted, UsageError
from adapterhub.manifest import BaseFingerprint, Record
from adapterhub.refs import AdapterRef
from adapterhub.registry import Cache, open_registry
from adapterhub.registry.drafts import find_run
from adapterhub.registry.signing import Signers
from adapterhub.settings import Settings, load_settings

if TYPE_CHECKING:
    from adapterhub.export import Certificate, ExportResult, Plan
    from adapterhub.export.speed import Speed

_SPEED = "export-speed.json"  # in the user's home folder of AdapterHub


@dataclass(frozen=True)
class Source:
    """What is exported: a folder, and what is known of it."""

    path: Path
    recorded: BaseFingerprint | None  # the base that it was trained on
    record: Record | None = None


def export(
    what: Annotated[
        str, typer.Argument(metavar="REF|DIR", help="tenant/adapter[@version], a run, or an adapter directory.")
    ],
    to: Annotated[
        Path, typer.Option("--to", metavar="DIR|FILE", help="A new folder for the model; for GGUF a new file.")
    ],
    base: BaseOption = None,
    dtype: Annotated[
        str | None,
        typer.Option("--dtype", metavar="NAME", help="float32, float16 or bfloat16; default: as the base."),
    ] = None,
    quantize: Annotated[
        str | None,
        typer.Option(
            "--quantize",
            metavar="SCHEME",
            help="For vLLM (compressed-tensors): w8a8 (int8), w8a16, w4a16 (weights alone) or fp8.",
        ),
    ] = None,
    group_size: Annotated[
        int | None,
        typer.Option("--group-size", metavar="N", help="Columns under one scale of w4a16: 128, 64 or 32; default 128."),
    ] = None,
    kl_divergence: Annotated[
        bool,
        typer.Option(
            "--kl-divergence",
            help="Compare the quantised model's answers with those without --quantize; loads each in float32.",
        ),
    ] = False,
    base_precision: Annotated[
        str | None,
        typer.Option(
            "--base-precision",
            metavar="NAME",
            help="Of a quantised base: original (its weights before that) or dequantized (what it stands for).",
        ),
    ] = None,
    max_shard_size: Annotated[
        str | None,
        typer.Option(
            "--max-shard-size", metavar="SIZE", help="Spread the weights anew: 5GB, 500MB; default: as the base."
        ),
    ] = None,
    link: Annotated[
        bool, typer.Option("--link", help="Hard links to the base's files where nothing in them changes.")
    ] = False,
    form: Annotated[
        Literal["safetensors", "gguf", "gguf-lora"],
        typer.Option("--format", help="gguf: the merged model for llama.cpp. gguf-lora: the adapter alone for it."),
    ] = "safetensors",
    gguf_type: Annotated[
        Literal["f32", "f16", "bf16", "q8_0"] | None,
        typer.Option("--gguf-type", help="What a GGUF file's weights are stored as; default f16.", show_default=False),
    ] = None,
    plan_only: Annotated[
        bool, typer.Option("--plan", help="Print what would be done, with time, memory and disk, and exit.")
    ] = False,
    resume: Annotated[bool, typer.Option("--resume", help="Go on with a killed export to the same folder.")] = False,
    certificate: Annotated[
        bool, typer.Option("--certificate/--no-certificate", help="Check the result and write export.json.")
    ] = True,
    require_signed_by: SignedByOption = None,
    bundle: BundleOption = None,
    registry_url: RegistryOption = None,
    as_json: JsonOption = False,
) -> None:
    """Merge an adapter into its base: a standalone model, checked before it has its name."""
    settings = load_settings()
    signers = Signers.read(require_signed_by or settings.require_signed_by)
    name = base or settings.base
    if bundle is not None:
        from adapterhub.cli.bundle import open_bundle

        opened = open_bundle(bundle, settings.home, signers=signers, registry=registry_url)
        registry_url = opened.registry
        name = base or (str(opened.base) if opened.base else settings.base)
    if name is None:
        raise UsageError(
            "exporting needs the base model",
            why="neither --base nor $AH_BASE names one",
            hint=f"ah export {what} --base BASE --to {to}",
        )
    of_folders = {
        "--dtype": dtype,
        "--quantize": quantize,
        "--group-size": group_size,
        "--kl-divergence": kl_divergence,
        "--max-shard-size": max_shard_size,
        "--link": link,
        "--plan": plan_only,
        "--resume": resume,
        "--no-certificate": not certificate,
    }
    check_gguf_flags(form, gguf_type, of_folders)
    source = find_source(what, settings, registry_url or settings.registry, signers=signers)
    if form != "safetensors":
        write_gguf(
            source.path,
            name,
            to,
            lora=form == "gguf-lora",
            kind=gguf_type or "f16",
            base_precision=base_precision,
            recorded=source.recorded,
            record=source.record,
            as_json=as_json,
        )
        return

    from adapterhub.base import find_base
    from adapterhub.export import export_model, last_speed, plan_export, remember

    model = find_base(name)
    largest = parse_size(max_shard_size, flag="--max-shard-size") if max_shard_size else None
    if plan_only:
        plan = plan_export(
            source.path,
            model,
            to.expanduser().absolute(),
            dtype=dtype,
            quantize=quantize,
            group_size=group_size,
            base_precision=base_precision,
            max_shard_size=largest,
            recorded=source.recorded,
        )
        data = _plan_data(plan, last_speed(settings.home / _SPEED), certificate=certificate)
        print_json(data) if as_json else _print_plan(plan, data)
        return
    with _progress(quiet=as_json, certificate=certificate) as progress:
        result = export_model(
            source.path,
            model,
            to,
            dtype=dtype,
            quantize=quantize,
            group_size=group_size,
            base_precision=base_precision,
            max_shard_size=largest,
            link=link,
            resume=resume,
            recorded=source.recorded,
            record=source.record,
            certificate=certificate,
            kl_divergence=kl_divergence,
            progress=progress,
        )
    if not resume and not link and not quantize:  # what quantising takes says nothing of other exports
        remember(
            settings.home / _SPEED,
            size=result.bytes_written,
            merge=result.merge_seconds,
            certificate=result.certificate_seconds,
        )
    print_json(result.to_json()) if as_json else _print_result(result)


def verify(
    folder: Annotated[Path, typer.Argument(metavar="DIR", help="A model that `ah export` made.")],
    as_json: JsonOption = False,
) -> None:
    """Compare an exported model's files with its certificate: what was changed, added or lost since?"""
    from adapterhub.export import verify as check

    certificate = check(folder)
    if as_json:
        print_json(certificate)
    else:
        typer.echo(f"{folder}: {len(certificate['files'])} files are as exported")


def find_source(what: str, settings: Settings, registry_url: str, *, signers: Signers) -> Source:
    """A run or an adapter directory where ``what`` is a folder that holds one, else a version of the registry.

    Raises Untrusted for a version that none of ``signers`` signed, and for any folder where there are some.
    """
    try:
        folder, run = find_run(Path(what).expanduser())
        found = folder.is_dir() or what.startswith((".", "/", "~"))
    except (OSError, ValueError):  # nothing that a folder can be called
        found = False
    if found and (run is not None or (folder / peftdir.CONFIG).is_file() or not _is_ref(what)):
        if signers.keys:
            raise Untrusted(f"{what} is not signed", why="it is a folder, and only versions of a registry are signed")
        return Source(folder, recorded=run.base if run else None)
    registry = open_registry(registry_url)
    version = registry.resolve(AdapterRef.parse(what))
    if version.status == "deprecated":
        typer.echo(f"{version.record.ref} is deprecated: {version.why or 'no reason given'}", err=True)
    record = version.record
    path = Cache(settings.cache, registry, signers=signers).fetch(record)
    return Source(path, recorded=record.manifest.base, record=record)


def _is_ref(what: str) -> bool:
    try:
        AdapterRef.parse(what)
    except InvalidName:
        return False
    return True


@contextmanager
def _progress(*, quiet: bool, certificate: bool) -> Iterator[Callable[[int, int], None] | None]:
    """A bar on a terminal's stderr; nothing elsewhere."""
    if quiet or not err().is_terminal:
        yield None
        return
    from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TransferSpeedColumn

    columns = (
        TextColumn("merging and checking" if certificate else "merging"),
        BarColumn(),
        DownloadColumn(),
        TransferSpeedColumn(),
    )
    with Progress(*columns, console=err(), transient=True) as bar:
        task = bar.add_task("", total=None)
        yield lambda done, total: bar.update(task, completed=done, total=total)


def _plan_data(plan: Plan, speed: Speed, *, certificate: bool) -> dict[str, Any]:
    from adapterhub.export import seconds

    told = {"seconds": round(seconds(plan, speed, certificate=certificate), 1), "speed": speed.told()}
    return {**plan.to_json(), **told}


def _print_plan(plan: Plan, data: dict[str, Any]) -> None:
    tensors = data["tensors"]
    typer.echo(f"model    {data['to']}")
    precision = ", dequantised" if data["base_precision"] == "dequantized" else ""
    how = f", linear layers {plan.scheme.told}" if plan.scheme else ""
    typer.echo(f"base     {data['base']}{precision}, written {data['dtype']}{how} in {data['files']} files")
    quantised = f", {tensors['quantised']} quantised" if plan.scheme else ""
    typer.echo(f"tensors  {tensors['merged']} merged{quantised}, {tensors['cast']} cast, {tensors['kept']} kept")
    typer.echo(f"read     {_size(data['bytes_read'])}")
    typer.echo(f"write    {_size(data['bytes_written'])}, of which merged {_size(data['bytes_merged'])}")
    typer.echo(f"memory   up to {_size(data['memory'])} above Python and torch")
    typer.echo(f"disk     up to {_size(data['disk'])} of {_size(data['disk_free'])} free")
    typer.echo(f"time     about {data['seconds']:.1f} s ({data['speed']})")
    if plan.note:
        typer.echo(f"note: {plan.note}", err=True)


def _print_result(result: ExportResult) -> None:
    if result.note:
        typer.echo(f"note: {result.note}", err=True)
    typer.echo(str(result.path))
    print_summary(result)


def print_summary(result: ExportResult) -> None:
    """What was written and checked, on stderr."""
    typer.echo(
        f"merged {result.merged} tensors, wrote {_size(result.bytes_written)} in {result.merge_seconds:.1f} s", err=True
    )
    if result.certificate:
        checked = result.certificate
        typer.echo(
            f"checked in {result.certificate_seconds:.1f} s: {checked.applied} of {checked.planned} planned tensors"
            f" merged, {checked.kept} kept byte for byte, {checked.sampled} weights within rounding of the float64 sum",
            err=True,
        )
        if checked.quantised:
            typer.echo(_quantised_told(checked), err=True)
        if checked.divergence:
            told = checked.divergence
            typer.echo(
                f"answers at {told.positions} places: KL divergence {told.kl_mean:.4f} nats on average, at most"
                f" {told.kl_largest:.3f}; the same next token at {told.same_top:.1%}",
                err=True,
            )


def _quantised_told(checked: Certificate) -> str:
    farthest = max(checked.quantised, key=lambda check: check.error)
    return (
        f"quantised {len(checked.quantised)} tensors, every code the nearest: {checked.error:.2%} from the weights that"
        f" they stand for (relative Frobenius norm), at most {farthest.error:.2%} ({farthest.tensor})"
    )


def _size(count: int) -> str:
    return f"{count / 1e9:.2f} GB" if count >= 1e8 else f"{count / 1e6:.1f} MB"
