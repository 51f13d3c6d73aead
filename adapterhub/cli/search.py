"""`ah search`: versions by what is said of them."""

from __future__ import annotations

from typing import Annotated, Any, cast, get_args

import typer

from adapterhub.cli.browse import tenant_overview
from adapterhub.cli.output import JsonOption, RegistryOption, print_json, print_table
from adapterhub.errors import UsageError
from adapterhub.manifest import to_plain
from adapterhub.registry import Status, open_registry
from adapterhub.registry.views.query import Hit, Query, comparison, metrics_of
from adapterhub.registry.views.query import search as find
from adapterhub.settings import load_settings


def search(
    words: Annotated[
        list[str] | None,
        typer.Argument(metavar="[WORD]...", help="In names, bases, authors, labels, channels.", show_default=False),
    ] = None,
    tenants: Annotated[
        list[str] | None, typer.Option("--tenant", metavar="TENANT", help="Default: all.", show_default=False)
    ] = None,
    base: Annotated[str, typer.Option("--base", metavar="TEXT", help="A part of the base's name.")] = "",
    ranks: Annotated[
        list[str] | None,
        typer.Option("--rank", metavar="N", help="16, or '>=16'; may be repeated.", show_default=False),
    ] = None,
    metrics: Annotated[
        list[str] | None,
        typer.Option(
            "--metric",
            metavar="M<N",
            help="'eval_loss<1.5' of the training, 'SUITE.METRIC>0.8' of evaluations; may be repeated.",
            show_default=False,
        ),
    ] = None,
    labels: Annotated[
        list[str] | None,
        typer.Option("--label", metavar="KEY[=VALUE]", help="May be repeated.", show_default=False),
    ] = None,
    statuses: Annotated[
        list[str] | None,
        typer.Option(
            "--status", metavar="STATUS", help="Default: active and deprecated; may be repeated.", show_default=False
        ),
    ] = None,
    registry_url: RegistryOption = None,
    as_json: JsonOption = False,
) -> None:
    """Find versions: all that is asked for must hold.

    Example: ah search refund --base qwen --rank '>=16' --metric 'heldout.accuracy>0.8' --label team=support
    """
    query = Query(
        words=tuple(words or ()),
        base=base,
        ranks=tuple(comparison(text, bare="rank") for text in ranks or ()),
        metrics=tuple(comparison(text) for text in metrics or ()),
        labels=dict(_label(text) for text in labels or ()),
        statuses=tuple(map(_status, statuses)) if statuses else Query().statuses,
    )
    registry = open_registry(registry_url or load_settings().registry)
    overviews = (
        [one for tenant in tenants for one in tenant_overview(registry, tenant)]
        if tenants
        else [one for tenant in registry.tenants() for one in registry.overview(tenant)]
    )
    hits = find(overviews, query)
    if as_json:
        print_json([_plain(hit) for hit in hits])
    elif not hits:
        typer.echo(f"nothing like that in {registry.url}", err=True)
    else:
        asked = list(dict.fromkeys(metric.what for metric in query.metrics))
        head = ["VERSION", "STATUS", "CHANNELS", "RANK", "BASE", *map(str.upper, asked), "LABELS", "CREATED"]
        print_table(head, [_row(hit, asked) for hit in hits])


def _row(hit: Hit, asked: list[str]) -> list[str]:
    found, measured = hit.summary, metrics_of(hit.summary)
    return [
        f"{found.name}@{found.version}",
        found.status,
        " ".join(hit.channels) or "-",
        str(found.rank),
        found.base or "-",
        *(f"{measured[metric]:g}" for metric in asked),
        " ".join(f"{key}={value}" for key, value in found.labels.items()) or "-",
        found.created,
    ]


def _plain(hit: Hit) -> dict[str, Any]:
    found = hit.summary
    plain = {**to_plain(found), "name": str(found.name)}
    return {"ref": f"{found.name}@{found.version}", **plain, "channels": list(hit.channels)}


def _label(text: str) -> tuple[str, str | None]:
    key, equals, value = text.partition("=")
    if not key:
        raise UsageError(f"{text!a} is no label", why="a label is KEY or KEY=VALUE", hint="ah search --label team=x")
    return key, value if equals else None


def _status(text: str) -> Status:
    if text not in get_args(Status):
        raise UsageError(f"there is no status {text!a}", why=f"one of {', '.join(get_args(Status))}")
    return cast(Status, text)
