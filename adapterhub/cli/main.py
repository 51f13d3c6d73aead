"""The `ah` command: one file a command group, errors printed and turned into exit codes here only.

Command modules import torch, vllm, transformers and boto3 inside the functions that need them, so that
`ah --help` and the registry commands start at once and run without the extras.
"""

from __future__ import annotations

import sys
from typing import Annotated

import typer

import adapterhub
from adapterhub.cli import ask, browse, channel, doctor, export, publish, pull, serve, status, train
from adapterhub.cli.output import report
from adapterhub.errors import AdapterHubError

app = typer.Typer(
    name="ah",
    help="LoRA adapters from training to serving: train, publish, serve many tenants on one base, export.",
    no_args_is_help=True,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


def _version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"adapterhub {adapterhub.__version__}")
        raise typer.Exit


@app.callback()
def _root(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    pass


app.command("train")(train.train)
app.command("publish")(publish.publish)
app.command("serve")(serve.serve)
app.command("ask")(ask.ask)
app.command("ls")(browse.ls)
app.command("show")(browse.show)
app.add_typer(channel.app, name="channel")
app.command("yank")(status.yank)
app.command("deprecate")(status.deprecate)
app.command("delete")(status.delete)
app.command("pull")(pull.pull)
app.command("export")(export.export)
app.command("verify")(export.verify)
app.command("doctor")(doctor.doctor)


def main() -> None:
    """Entry point of `ah`."""
    try:
        app()
    except AdapterHubError as error:
        sys.exit(report(error))
    except KeyboardInterrupt:
        sys.exit(130)


if __name__ == "__main__":
    main()
