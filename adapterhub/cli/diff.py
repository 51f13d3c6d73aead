"""`ah diff`: two versions side by side."""

from __future__ import annotations

import json
import math
import tempfile
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import typer

from adapterhub.cli.browse import find_version
from adapterhub.cli.output import JsonOption, RegistryOption, bytes_shown, print_json, print_table
from adapterhub.manifest import parse_json
from adapterhub.peftdir import CONFIG
from adapterhub.refs import AdapterRef
from adapterhub.registry import Cache, Registry, Version, open_registry
from adapterhub.registry.views.difference import Change, by_layer, changes, differing, facts, total
from adapterhub.settings import load_settings


def diff(
    first: Annotated[str, typer.Argument(metavar="TENANT/ADAPTER[@VERSION]")],
    second: Annotated[str, typer.Argument(metavar="VERSION", help="The whole name, or of the same adapter 2 or prod.")],
    weights: Annotated[bool, typer.Option(help="Also compare what the weights do; fetches both versions.")] = True,
    modules: Annotated[bool, typer.Option("--modules", help="Each module instead of each layer.")] = False,
    registry_url: RegistryOption = None,
    as_json: JsonOption = False,
) -> None:
    """Compare two versions: config, data, metrics, and how far apart their changes of the base are.

    Example: ah diff acme/support@2 3
    """
    settings = load_settings()
    registry = open_registry(registry_url or settings.registry)
    one = AdapterRef.parse(first)
    pair = find_version(registry, one), find_version(registry, _second(one, second))
    said = differing(_facts(registry, pair[0]), _facts(registry, pair[1]))
    done: list[Change] = []
    if weights and pair[0].record.digest != pair[1].record.digest:
        cache = Cache(settings.cache, registry)
        with bytes_shown("fetching", quiet=as_json) as progress:
            folders = [cache.fetch(version.record, progress=progress) for version in pair]
        done = changes(folders[0], folders[1])
    if as_json:
        print_json(_plain(pair, said, done))
    else:
        _print(pair, said, done if modules else by_layer(done))


def _second(first: AdapterRef, text: str) -> AdapterRef:
    return AdapterRef.parse(text if "/" in text else f"{first.name}@{text.removeprefix('@')}")


def _facts(registry: Registry, version: Version) -> dict[str, Any]:
    record = version.record
    with tempfile.TemporaryDirectory() as folder:
        config: Any = {}
        if version.status != "deleted":  # whose bytes may be gone
            registry.fetch_file(record, CONFIG, Path(folder) / CONFIG)
            config = parse_json((Path(folder) / CONFIG).read_bytes(), what=f"{CONFIG} of {record.ref}")
    return facts(version, registry.evaluations(record.name, record.version), config)


def _plain(pair: tuple[Version, Version], said: dict[str, tuple[Any, Any]], done: list[Change]) -> dict[str, Any]:
    return {
        "versions": [str(version.record.ref) for version in pair],
        "digests": [version.record.digest for version in pair],
        "differs": {key: list(values) for key, values in said.items()},
        "weights": {
            "all": asdict(total("all", done)) if done else None,
            "layers": [asdict(change) for change in by_layer(done)],
            "modules": [asdict(change) for change in done],
        },
    }


def _print(pair: tuple[Version, Version], said: dict[str, tuple[Any, Any]], done: list[Change]) -> None:
    refs = [str(version.record.ref) for version in pair]
    if pair[0].record.digest == pair[1].record.digest:
        typer.echo(f"{refs[0]} and {refs[1]} are the same bytes: {pair[0].record.digest}")
    if said:
        print_table(["", *refs], [[key, _value(values[0]), _value(values[1])] for key, values in said.items()])
    if done:
        typer.echo("")
        head = ["WEIGHTS", f"NORM {refs[0]}", f"NORM {refs[1]}", "APART", "COSINE", "OVERLAP IN", "OVERLAP OUT"]
        print_table(head, [_row(change) for change in [*done, total("all", done)]])


def _row(change: Change) -> list[str]:
    numbers = (*change.norms, change.apart, change.cosine, change.overlap_in, change.overlap_out)
    return [change.where, *("-" if n is None or math.isnan(n) else f"{n:.3g}" for n in numbers)]


def _value(value: Any) -> str:
    if value is None or value == "":
        return "-"
    if isinstance(value, float):
        return f"{value:g}"
    if isinstance(value, list) and all(isinstance(item, str) for item in value):
        return " ".join(value) or "-"
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
