"""`ah rollout`: a candidate for a share of a channel's callers.

Works on the registry alone, and servers follow it; or with ``--url`` through a server, for who may not write there.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from functools import partial
from typing import Annotated, Any

import typer

from adapterhub.cli.loaded import admin
from adapterhub.cli.output import JsonOption, RegistryOption, print_json, print_table
from adapterhub.manifest import to_plain
from adapterhub.refs import AdapterName
from adapterhub.registry import ChannelMove, Registry, open_registry
from adapterhub.registry.views import rollouts
from adapterhub.settings import load_settings

app = typer.Typer(
    help="Try a version on a share of a channel's callers, then promote it or go back.", no_args_is_help=True
)

NameArgument = Annotated[str, typer.Argument(metavar="TENANT/ADAPTER")]
ChannelArgument = Annotated[str, typer.Argument(metavar="CHANNEL", help="Like prod.")]
WhyOption = Annotated[str, typer.Option("--why", metavar="TEXT", help="Kept in the channel's log.")]
UrlOption = Annotated[
    str | None,
    typer.Option("--url", metavar="URL", help="Through this server's admin API, with $AH_API_KEY.", show_default=False),
]
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
    min_score: Annotated[
        float | None,
        typer.Option(
            "--min-score",
            metavar="SHARE",
            help="Servers with --prompts for the adapter roll back when the candidate scores less, before it has a "
            "caller and while it has some.",
            show_default=False,
        ),
    ] = None,
    why: WhyOption = "",
    url: UrlOption = None,
    registry_url: RegistryOption = None,
    as_json: JsonOption = False,
) -> None:
    """Give a candidate a share of the callers; again, to change the share or to go on after a pause."""
    adapter = AdapterName.parse(name)
    given = {
        "max_error_rate": max_error_rate,
        "max_slowdown": max_slowdown,
        "min_requests": min_requests,
        "min_score": min_score,
    }
    gates = {gate: value for gate, value in given.items() if value is not None}
    if url is not None:
        _ask_server(
            "start", adapter, channel, url, as_json=as_json, why=why, candidate=candidate, weight=weight, **gates
        )
        return
    registry = _open(registry_url)
    version = registry.resolve(adapter.at(candidate)).record.version
    begin = partial(rollouts.start, candidate=version, weight=weight, gates=gates)
    _move(registry, adapter, channel, begin, why=why, as_json=as_json)


@app.command("promote")
def promote(
    name: NameArgument,
    channel: ChannelArgument,
    why: WhyOption = "",
    url: UrlOption = None,
    registry_url: RegistryOption = None,
    as_json: JsonOption = False,
) -> None:
    """Give the candidate all callers."""
    if url is not None:
        _ask_server("promote", AdapterName.parse(name), channel, url, as_json=as_json, why=why)
        return
    _move(_open(registry_url), AdapterName.parse(name), channel, rollouts.promote, why=why, as_json=as_json)


@app.command("pause")
def pause(
    name: NameArgument,
    channel: ChannelArgument,
    why: WhyOption = "",
    url: UrlOption = None,
    registry_url: RegistryOption = None,
    as_json: JsonOption = False,
) -> None:
    """Give all callers back to the stable version for now; `start` brings the same ones to the candidate again."""
    if url is not None:
        _ask_server("pause", AdapterName.parse(name), channel, url, as_json=as_json, why=why)
        return
    _move(_open(registry_url), AdapterName.parse(name), channel, rollouts.pause, why=why, as_json=as_json)


@app.command("abort")
def abort(
    name: NameArgument,
    channel: ChannelArgument,
    why: WhyOption = "",
    url: UrlOption = None,
    registry_url: RegistryOption = None,
    as_json: JsonOption = False,
) -> None:
    """Give all callers back to the stable version, as a rollback."""
    if url is not None:
        _ask_server("abort", AdapterName.parse(name), channel, url, as_json=as_json, why=why)
        return
    _move(_open(registry_url), AdapterName.parse(name), channel, rollouts.abort, why=why, as_json=as_json)


@app.command("status")
def status(
    name: NameArgument,
    channel: ChannelArgument,
    watch: Annotated[bool, typer.Option("--watch", help="Go on, a line a change, until none is running.")] = False,
    url: UrlOption = None,
    registry_url: RegistryOption = None,
    as_json: JsonOption = False,
) -> None:
    """Show where a channel's rollout stands; with --url also what that server has counted."""
    adapter = AdapterName.parse(name)
    if url is not None:
        _watch_server(adapter, channel, url, watch=watch, as_json=as_json)
        return
    registry, shown = _open(registry_url), 0
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


def _ask_server(
    verb: str, adapter: AdapterName, channel: str, url: str, *, as_json: bool, **body: Any
) -> dict[str, Any]:
    """One verb of the admin API, and its answer shown. Raises like `admin`."""
    told: dict[str, Any] = admin(
        "POST", f"rollout/{verb}", url=url, body={"channel": str(adapter.at(channel)), **body}, scope="channels"
    )
    if as_json:
        print_json(told)
    else:
        typer.echo("\n".join(_told_lines(told)))
    return told


def _watch_server(adapter: AdapterName, channel: str, url: str, *, watch: bool, as_json: bool) -> None:
    """A picture every few seconds, until no rollout is running."""
    while True:
        told = _ask_server("status", adapter, channel, url, as_json=as_json)
        if not watch or told["trial"]["phase"] != "running":
            return
        time.sleep(_LOOK_SECONDS)


def _told_lines(told: dict[str, Any]) -> Iterator[str]:
    """What a server says of a rollout, for people."""
    shares = " ".join(f"{version}:{weight}%" for version, weight in told["ready"].items())
    trial = told["trial"]
    phase = f"  rollout of {trial['candidate']['version']} {trial['phase']}" if trial["candidate"] else ""
    yield f"{told['channel']} → {shares}{phase}"
    for version, seen in told["counts"].items():
        first = seen["first_byte_seconds"]
        speed = "" if first is None else f", first byte after {first:.3g} s"
        yield f"  version {version}: {seen['requests']} requests, {seen['failed']} failed{speed}"
    if told["score"] is not None:
        yield f"  the candidate scores {told['score']:.3g} on its prompts"
    if told["problem"]:
        yield f"  not followed yet: {told['problem']}"


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
        + (f"; under a score of {gates.min_score:g} on their prompts" if gates.min_score is not None else "")
    )
