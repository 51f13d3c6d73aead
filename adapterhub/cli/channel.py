"""`ah channel`: movable names for versions, with their history."""

from __future__ import annotations

from typing import Annotated, Any

import typer

from adapterhub.cli.output import JsonOption, RegistryOption, print_json, print_table
from adapterhub.cli.rollout import targets_text
from adapterhub.manifest import to_plain
from adapterhub.refs import AdapterName
from adapterhub.registry import ChannelMove, Registry, open_registry
from adapterhub.settings import load_settings

app = typer.Typer(help="Point channels at versions, look at their history, roll them back.", no_args_is_help=True)

NameArgument = Annotated[str, typer.Argument(metavar="TENANT/ADAPTER")]
ChannelArgument = Annotated[str, typer.Argument(metavar="CHANNEL", help="Like prod or canary.")]
WhyOption = Annotated[str, typer.Option("--why", metavar="TEXT", help="Kept in the channel's log.")]


@app.command("set")
def set_channel(
    name: NameArgument,
    channel: ChannelArgument,
    version: Annotated[str, typer.Argument(metavar="VERSION", help="A number, a digest or another channel.")],
    why: WhyOption = "",
    force: Annotated[bool, typer.Option("--force", help="Also when somebody moves it at the same moment.")] = False,
    registry_url: RegistryOption = None,
    as_json: JsonOption = False,
) -> None:
    """Point a channel at a version."""
    settings = load_settings()
    registry = open_registry(registry_url or settings.registry)
    adapter = AdapterName.parse(name)
    target = _version(registry, adapter, version)
    move = registry.set_channel(adapter, channel, {target: 100}, who=settings.author, why=why, force=force)
    _print_move(adapter, move, as_json=as_json)


@app.command("log")
def log(
    name: NameArgument,
    channel: ChannelArgument,
    registry_url: RegistryOption = None,
    as_json: JsonOption = False,
) -> None:
    """Show all moves of a channel, newest first."""
    registry = open_registry(registry_url or load_settings().registry)
    moves = registry.channel_log(AdapterName.parse(name), channel)
    if as_json:
        print_json([to_plain(move) for move in moves])
        return
    head = ["SEQ", "VERSION", "MOVE", "WHEN", "WHO", "WHY"]
    print_table(head, [[str(m.seq), targets_text(m), _kind(m), m.when, m.who, m.why] for m in moves])


@app.command("rollback")
def rollback(
    name: NameArgument,
    channel: ChannelArgument,
    version: Annotated[
        str | None, typer.Argument(metavar="[VERSION]", help="Default: the deployment before.", show_default=False)
    ] = None,
    why: WhyOption = "",
    registry_url: RegistryOption = None,
    as_json: JsonOption = False,
) -> None:
    """Point a channel back at the deployment before the present one, or at a version."""
    settings = load_settings()
    registry = open_registry(registry_url or settings.registry)
    adapter = AdapterName.parse(name)
    to = _version(registry, adapter, version) if version is not None else None
    move = registry.rollback(adapter, channel, to=to, who=settings.author, why=why)
    _print_move(adapter, move, as_json=as_json)


def _version(registry: Registry, name: AdapterName, selector: str) -> int:
    return registry.resolve(name.at(selector)).record.version


def _print_move(name: AdapterName, move: ChannelMove, *, as_json: bool) -> None:
    if as_json:
        data: dict[str, Any] = {"adapter": str(name), **to_plain(move)}
        print_json(data)
    else:
        typer.echo(f"{name}@{move.channel} → {targets_text(move)}")


def _kind(move: ChannelMove) -> str:
    return f"rollback of {move.undoes}" if move.kind == "rollback" else move.kind
