"""The `ah` command: one file a command group, errors printed and turned into exit codes here only.

Only the command that was asked for is imported: `ah ls` has 0.35 s in all (docs/decisions/0003). For the same reason
command modules import torch, vllm, transformers and boto3 inside the functions that need them, so that `ah --help`
and the registry commands start at once and run without the extras.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable
from importlib import import_module
from typing import Annotated

import typer

import adapterhub
from adapterhub.cli.output import report
from adapterhub.errors import AdapterHubError

# command → the module of adapterhub.cli that has it, and its name there; in the order of `ah --help`
COMMANDS = {
    "train": ("train", "train"),
    "plan": ("plan", "plan"),
    "config": ("config", "app"),
    "eval": ("evaluate", "evaluate"),
    "publish": ("publish", "publish"),
    "reproduce": ("reproduce", "reproduce"),
    "serve": ("serve", "serve"),
    "ask": ("ask", "ask"),
    "tenant": ("tenant", "app"),
    "key": ("key", "app"),
    "usage": ("usage", "usage"),
    "loaded": ("loaded", "loaded"),
    "ls": ("browse", "ls"),
    "show": ("browse", "show"),
    "search": ("search", "search"),
    "log": ("story", "log"),
    "tree": ("story", "tree"),
    "diff": ("diff", "diff"),
    "channel": ("channel", "app"),
    "rollout": ("rollout", "app"),
    "yank": ("status", "yank"),
    "deprecate": ("status", "deprecate"),
    "delete": ("status", "delete"),
    "sign": ("sign", "sign"),
    "signatures": ("sign", "signatures"),
    "pull": ("pull", "pull"),
    "copy": ("copy", "copy"),
    "mirror": ("copy", "mirror"),
    "bundle": ("bundle", "bundle"),
    "import": ("bundle", "import_"),
    "fsck": ("fsck", "fsck"),
    "gc": ("life", "gc"),
    "retain": ("life", "retain"),
    "delete-tenant": ("life", "delete_tenant"),
    "export": ("export", "export"),
    "verify": ("export", "verify"),
    "merge": ("merge", "merge"),
    "extract": ("extract", "extract"),
    "registry": ("registry", "app"),
    "doctor": ("doctor", "doctor"),
}


def build(names: Iterable[str] = COMMANDS) -> typer.Typer:
    """The application with these commands, whose modules are imported here."""
    app = typer.Typer(
        name="ah",
        help="LoRA adapters from training to serving: train, publish, serve many tenants on one base, export.",
        no_args_is_help=True,
        rich_markup_mode=None,
        pretty_exceptions_enable=False,
        context_settings={"help_option_names": ["-h", "--help"]},
    )
    app.callback()(_root)
    for name in names:
        module, attribute = COMMANDS[name]
        command = getattr(import_module(f"adapterhub.cli.{module}"), attribute)
        if isinstance(command, typer.Typer):
            app.add_typer(command, name=name)
        else:
            app.command(name)(command)
    return app


def _version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"adapterhub {adapterhub.__version__}")
        raise typer.Exit


def _root(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    pass


def main() -> None:
    """Entry point of `ah`."""
    asked = [word for word in sys.argv[1:2] if word in COMMANDS]
    try:
        build(asked or COMMANDS)()
    except AdapterHubError as error:
        sys.exit(report(error))
    except KeyboardInterrupt:
        sys.exit(130)


if __name__ == "__main__":
    main()
