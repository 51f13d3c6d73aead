"""`ah export --format gguf` and `gguf-lora`: one file for llama.cpp."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import typer

from adapterhub.cli.output import bytes_shown, print_json
from adapterhub.errors import UsageError
from adapterhub.manifest import BaseFingerprint, Record


def check_gguf_flags(form: str, kind: str | None, of_folders: Mapping[str, object]) -> None:
    """Nothing is accepted and ignored. ``of_folders``: flags that a GGUF file has no use for. Raises UsageError."""
    if form == "safetensors":
        if kind is not None:
            raise UsageError("--gguf-type is for GGUF alone", hint=f"--format gguf --gguf-type {kind}")
        return
    given = [flag for flag, value in of_folders.items() if value]
    if given:
        hint = "--gguf-type f32, f16, bf16 or q8_0" if {"--dtype", "--quantize"} & {*given} else f"leave {given[0]} out"
        raise UsageError(f"{given[0]} is not for --format {form}", why="a GGUF file is written in one go", hint=hint)


def write_gguf(
    adapter: Path,
    base: str,
    to: Path,
    *,
    lora: bool,
    kind: str,
    base_precision: str | None,
    recorded: BaseFingerprint | None,
    record: Record | None,
    as_json: bool,
) -> None:
    from adapterhub.base import find_base
    from adapterhub.export.gguf import export_gguf

    with bytes_shown("writing", quiet=as_json) as progress:
        result = export_gguf(
            adapter,
            find_base(base),
            to.expanduser(),
            kind=kind,
            lora=lora,
            base_precision=base_precision,
            recorded=recorded,
            record=record,
            progress=progress,
        )
    if as_json:
        print_json(result.to_json())
        return
    if result.note:
        typer.echo(f"note: {result.note}", err=True)
    typer.echo(str(result.path))
    typer.echo(
        f"{result.tensors} tensors as {result.kind}, {result.bytes_written / 1e6:.1f} MB in {result.seconds:.1f} s",
        err=True,
    )
