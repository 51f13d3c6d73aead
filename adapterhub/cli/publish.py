"""`ah publish`: an adapter directory becomes the next version of a name."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from adapterhub.cli.output import (
    BaseOption,
    JsonOption,
    RegistryOption,
    SignOption,
    bytes_shown,
    key_password,
    print_json,
    say,
)
from adapterhub.errors import UsageError
from adapterhub.manifest import Record, to_plain
from adapterhub.refs import AdapterName, check_channel
from adapterhub.registry import ChannelMove, draft, open_registry
from adapterhub.registry.hub.imports import fetched, is_hub_source
from adapterhub.registry.parallel import meanwhile
from adapterhub.registry.signing import sign, signature_of
from adapterhub.settings import load_settings


def publish(
    context: typer.Context,
    path: Annotated[
        str,
        typer.Argument(
            metavar="RUN|DIR|hf://OWNER/REPO[@REVISION]",
            help="A run of `ah train`, an adapter directory, or somebody's adapter on the Hugging Face Hub.",
        ),
    ],
    name: Annotated[
        str | None, typer.Option("--name", metavar="TENANT/ADAPTER", help="What to publish as; default: the run's.")
    ] = None,
    channel: Annotated[
        str | None, typer.Option("--channel", metavar="NAME", help="Then point this channel at it; default: the run's.")
    ] = None,
    base: BaseOption = None,
    purpose: Annotated[
        Literal["serve", "export"], typer.Option("--for", help="What it must be good for; refused otherwise.")
    ] = "serve",
    label: Annotated[
        list[str] | None, typer.Option("--label", metavar="KEY=VALUE", help="Kept with the version; may be repeated.")
    ] = None,
    allow_zero: Annotated[
        bool, typer.Option("--allow-zero", help="Publish even an adapter that changes nothing.")
    ] = False,
    require: Annotated[
        list[str] | None,
        typer.Option(
            "--require",
            metavar="COMPARISON",
            help='Publish only if it holds on the evaluation data: "eval_loss < base"; may be repeated.',
        ),
    ] = None,
    eval_data: Annotated[
        list[Path] | None,
        typer.Option("--eval-data", metavar="JSONL", help="Rows for --require; default: the run's evaluation rows."),
    ] = None,
    score: Annotated[
        list[str] | None,
        typer.Option("--score", metavar="SCORER", help="A metric for --require besides the loss: see ah eval."),
    ] = None,
    sign_with: SignOption = None,
    registry_url: RegistryOption = None,
    as_json: JsonOption = False,
) -> None:
    """Publish an adapter as the next version: checked, hashed, immutable."""
    settings = load_settings()
    registry = open_registry(registry_url or settings.registry)
    chosen = AdapterName.parse(name) if name is not None else None
    labels = _labels(label or [])
    if channel is not None:
        check_channel(channel)
    folder = Path(path)
    if is_hub_source(path):
        folder, source = context.with_resource(fetched(path))
        labels = {**source.labels, **labels}
        say(f"publishing {source.repo} as of {source.commit}")
    with meanwhile(registry.reach):
        adapter = draft(folder, base=_find_base(base or settings.base), allow_zero=allow_zero, purpose=purpose)
    if adapter.run is not None:
        chosen = chosen or adapter.run.name
        channel = channel or adapter.run.channel
        labels = {**adapter.run.labels, **labels}
    if chosen is None:
        raise UsageError(
            f"{path} has no name to be published under",
            why="neither the command nor the run's config names one",
            hint=f"ah publish {path} --name acme/support",
        )
    if channel is not None:
        check_channel(channel)
    gate = None
    if require:
        from adapterhub.cli.gate import passed

        gate = passed(
            folder, require, registry=registry, base=base or settings.base, data=eval_data or [], score=score or []
        )
    elif eval_data or score:
        raise UsageError("--eval-data and --score are for --require", hint='--require "eval_loss < base"')
    password = key_password()
    if sign_with is not None:
        signature_of(adapter.manifest, key=sign_with, password=password)  # a key that cannot sign publishes nothing
    for note in adapter.notes:
        say(f"note: {note}")
    with bytes_shown("publishing", quiet=as_json) as progress:
        record = registry.publish(adapter, name=chosen, author=settings.author, labels=labels, progress=progress)
    if gate is not None:
        gate.keep(registry, record, who=settings.author)
    if sign_with is not None:
        signature = sign(registry, record, key=sign_with, password=password)
        say(f"signed with the key {signature.key[:12]}…")
    move = None
    if channel is not None:
        say(f"published {record.ref}; now pointing {channel} at it")
        move = registry.set_channel(chosen, channel, {record.version: 100}, who=settings.author)
    if as_json:
        print_json(_as_json(record, move, registry.url))
    else:
        _print(record, move)


def _find_base(name: str | None) -> Any:
    if name is None:
        return None
    from adapterhub.base import find_base

    return find_base(name)


def _labels(pairs: list[str]) -> dict[str, str]:
    labels = {}
    for pair in pairs:
        key, equals, value = pair.partition("=")
        if not key or not equals:
            raise UsageError(f"{pair!a} is no label", why="a label is KEY=VALUE", hint="--label team=billing")
        labels[key] = value
    return labels


def _as_json(record: Record, move: ChannelMove | None, registry: str) -> dict[str, Any]:
    return {
        "ref": str(record.ref),
        "version": record.version,
        "digest": record.digest,
        "verdicts": to_plain(record.verdicts),
        "size": record.manifest.size,
        "channel": move.channel if move else None,
        "labels": dict(record.labels),
        "registry": registry,
    }


def _print(record: Record, move: ChannelMove | None) -> None:
    typer.echo(f"{record.ref}  {record.digest}")
    for use, verdict in to_plain(record.verdicts).items():
        typer.echo(f"  {use:<8}{verdict['answer']:<9}{verdict['reason']}".rstrip())
    if move is not None:
        typer.echo(f"  channel {move.channel} → {record.version}")
