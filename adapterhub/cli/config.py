"""`ah config …`: the keys of a training, for editors and for people."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from adapterhub.cli.output import JsonOption, print_json, say
from adapterhub.errors import StorageError

app = typer.Typer(
    help="The keys of a training: their JSON Schema for editors, and what each means.", no_args_is_help=True
)


@app.command()
def schema(
    file: Annotated[Path | None, typer.Option("--out", metavar="FILE", help="Write it there instead.")] = None,
) -> None:
    """Print the JSON Schema of a training's config, for editors."""
    from adapterhub.trainers.dialect.schema import schema as make

    text = json.dumps(make(), indent=1, ensure_ascii=False) + "\n"
    if file is None:
        typer.echo(text, nl=False)
        return
    try:
        file.write_text(text, encoding="utf-8")
    except OSError as error:
        raise StorageError(f"{file} cannot be written", why=error.strerror or str(error)) from error
    say(f"written: {file}; the first line of a config that uses it:")
    say(f"# yaml-language-server: $schema={file}")


@app.command()
def explain(
    key: Annotated[str, typer.Argument(metavar="KEY", help="lora_r, datasets.train_on_eos, adapterhub.task, …")],
    as_json: JsonOption = False,
) -> None:
    """Say what a key means, what it takes and its default."""
    from adapterhub.trainers.dialect.explain import explain as look_up

    found = look_up(key)
    if as_json:
        print_json({"key": found.key, "meaning": found.meaning, "takes": found.takes, "default": found.default})
        return
    typer.echo(f"{found.key}: {found.meaning}")
    typer.echo(f"takes: {found.takes}")
    if found.default is not None:
        typer.echo(f"default: {str(found.default).lower() if isinstance(found.default, bool) else found.default}")
