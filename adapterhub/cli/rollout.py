"""`ah rollout`: a candidate for a share of a channel's callers. Works on the registry alone; servers follow it."""

from __future__ import annotations

import time
from collections.abc import Callable
from functools import partial
from typing import Annotated, Any

import typer

from adapterhub.cli.output import JsonOption, RegistryOption, print_json, print_table
from adapterhub.manifest import to_plain
from adapterhub.refs import AdapterName
from adapterhub.registry import ChannelMove, Registry, open_registry, rollouts
from adapterhub.settings import load_settings

app = typer.Typer(
    help="Try a version on a share of a channel's callers, then promote it or go back.", no_args_is_help=True
)

NameArgument = Annotated[str, typer.Argument(metavar="TENANT/ADAPTER")]
ChannelArgument = Annotated[str, typer.Argument(metavar="CHANNEL", help="Like prod.")]
WhyOption = Annotated[str, typer.Option("--why", metavar="TEXT", help="Kept in the channel's log.")]
_LOOK_SECONDS = 2.0
_DEFAULT = rollouts.Gates()


@app.command("start")
def start(
    name: NameArgument,
    channel: ChannelArgument,
    candidate: Annotated[str, typer.Argument(metavar="CANDIDATE", help="A number, a digest or another channel.")],
    weight: Annotated[int, typer.Option("--weight", metavar="PERCENT", help="Of the callers, 1 to 99.")] = 5,
    max_error_rate: Annotated[
        float | None,
        typer.Option(
            "--max-error-rate",
            metavar="SHARE",
            help=f"Servers roll back when more of the candidate's requests fail; default {_DEFAULT.max_error_rate}.",
            show_default=False,
        ),
    ] = None,
    max_slowdown: Annotated[
        float | None,
        typer.Option(
            "--max-slowdown",
            metavar="FACTOR",
            help="Servers roll back when its median time to the first byte is over that of the stable version "
            f"times this; default {_DEFAULT.max_slowdown}.",
            show_default=False,
        ),
    ] = None,
    min_requests: Annotated[
        int | None,
        typer.Option(
            "--min-requests",
            metavar="N",
            help=f"That a server must have seen before it judges; default {_DEFAULT.min_requests}.",
            show_default=False,
        ),
    ] = None,
    why: WhyOption = "",
    registry_url: RegistryOption = None,
    as_json: JsonOption = False,
) -> None:
    """Give a candidate a share of the callers; again, to change the share or to go on after a pause."""
    registry, adapter = _open(registry_url), AdapterName.parse(name)
    version = registry.resolve(adapter.at(candidate)).record.version
    given = {"max_error_rate": max_error_rate, "max_slowdown": max_slowdown, "min_requests": min_requests}
    gates = {gate: value for gate, value in given.items() if value is not None}
    begin = partial(rollouts.start, candidate=version, weight=weight, gates=gates)
    _move(registry, adapter, channel, begin, why=why, as_json=as_json)


@app.command("promote")
def promote(
    name: NameArgument,
    channel: ChannelArgument,
    why: WhyOption = "",
    registry_url: RegistryOption = None,
    as_json: JsonOption = False,
) -> None:
    """Give the candidate all callers."""
    _move(_open(registry_url), AdapterName.parse(name), channel, rollouts.promote, why=why, as_json=as_json)


@app.command("pause")
def pause(
    name: NameArgument,
    channel: ChannelArgument,
    why: WhyOption = "",
    registry_url: RegistryOption = None,
    as_json: JsonOption = False,
) -> None:
    """Give all callers back to the stable version for now; `start` brings the same ones to the candidate again."""
    _move(_open(registry_url), AdapterName.parse(name), channel, rollouts.pause, why=why, as_json=as_json)


@app.command("abort")
def abort(
    name: NameArgument,
    channel: ChannelArgument,
    why: WhyOption = "",
    registry_url: RegistryOption = None,
    as_json: JsonOption = False,
) -> None:
    """Give all callers back to the stable version, as a rollback."""
    _move(_open(registry_url), AdapterName.parse(name), channel, rollouts.abort, why=why, as_json=as_json)


@app.command("status")
def status(
    name: NameArgument,
    channel: ChannelArgument,
    watch: Annotated[bool, typer.Option("--watch", help="Go on, a line a change, until none is running.")] = False,
    registry_url: RegistryOption = None,
    as_json: JsonOption = False,
) -> None:
    """Show where a channel's rollout stands."""
    registry, adapter = _open(registry_url), AdapterName.parse(name)
    shown = 0
    while True:
        trial = rollouts.read(registry.channel_log(adapter, channel))
        if trial.move.seq != shown:
            _print_trial(adapter, trial, as_json=as_json)
            shown = trial.move.seq
        if not watch or trial.phase != "running":
            return
        time.sleep(_LOOK_SECONDS)


@app.command("history")
def history(
    name: NameArgument,
    channel: ChannelArgument,
    registry_url: RegistryOption = None,
    as_json: JsonOption = False,
) -> None:
    """Show all moves of a channel and the phase after each, newest first."""
    log = _open(registry_url).channel_log(AdapterName.parse(name), channel)
    phases = [rollouts.read(log[place:]).phase for place in range(len(log))]
    if as_json:
        print_json([{"phase": phase, **to_plain(move)} for phase, move in zip(phases, log, strict=True)])
        return
    rows = [
        [str(m.seq), "" if phase == "none" else phase, targets_text(m), m.when, m.who, m.why]
        for phase, m in zip(phases, log, strict=True)
    ]
    print_table(["SEQ", "PHASE", "VERSIONS", "WHEN", "WHO", "WHY"], rows)


def _open(registry_url: str | None) -> Registry:
    return open_registry(registry_url or load_settings().registry)


def _move(
    registry: Registry,
    name: AdapterName,
    channel: str,
    verb: Callable[..., ChannelMove],
    *,
    why: str,
    as_json: bool,
) -> None:
    verb(registry, name=name, channel=channel, who=load_settings().author, why=why)
    _print_trial(name, rollouts.read(registry.channel_log(name, channel)), as_json=as_json)


def _print_trial(name: AdapterName, trial: rollouts.Trial, *, as_json: bool) -> None:
    if as_json:
        data: dict[str, Any] = {"adapter": str(name), **to_plain(trial)}
        print_json(data)
        return
    words = [f"{name}@{trial.move.channel} → {targets_text(trial.move)}"]
    if trial.candidate is not None:
        words.append(f"rollout of {trial.candidate.version} {trial.phase}")
    words += [trial.move.when, f"by {trial.move.who}", trial.move.why]
    typer.echo("  ".join(word for word in words if word))
    if trial.phase == "running":
        typer.echo(f"  rolled back by servers: {_gates_text(trial.gates)}")


def targets_text(move: ChannelMove) -> str:
    """``3``, or ``3:95% 4:5%``."""
    if len(move.targets) == 1:
        return str(move.targets[0].version)
    return " ".join(f"{target.version}:{target.weight}%" for target in move.targets)


def _gates_text(gates: rollouts.Gates | None) -> str:
    if gates is None:
        return "never (no gates were set with this move)"
    return (
        f"over {100 * gates.max_error_rate:g} % errors, or {gates.max_slowdown:g} times the stable version's time to "
        f"the first byte, from {gates.min_requests:g} requests on"
    )
