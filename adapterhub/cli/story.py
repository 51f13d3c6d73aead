"""`ah log` and `ah tree`: what happened to an adapter, and what was made from what."""

from __future__ import annotations

from typing import Annotated, Any

import typer

from adapterhub.cli.browse import find_version, tenant_overview
from adapterhub.cli.output import JsonOption, RegistryOption, print_json, print_table
from adapterhub.manifest import to_plain
from adapterhub.refs import AdapterRef
from adapterhub.registry import Registry, open_registry
from adapterhub.registry.base import Logs
from adapterhub.registry.views.history import Happening, history
from adapterhub.registry.views.lineage import Branch, Node, drawn, family, graph
from adapterhub.settings import load_settings


def log(
    what: Annotated[
        str,
        typer.Argument(
            metavar="TENANT/ADAPTER[@VERSION|@CHANNEL]", help="With a version or a channel: what concerns that one."
        ),
    ],
    limit: Annotated[int, typer.Option("--limit", "-n", metavar="N", min=1, help="At most so many.")] = 50,
    registry_url: RegistryOption = None,
    as_json: JsonOption = False,
) -> None:
    """Show what happened to an adapter, newest first: publishes, channel moves, statuses, evaluations."""
    registry = open_registry(registry_url or load_settings().registry)
    happenings = _happenings(registry, what, limit)[:limit]
    if as_json:
        print_json([to_plain(happening) for happening in happenings])
        return
    rows = [
        [h.when, h.who, " ".join(f"@{version}" for version in h.versions), h.what, h.why or "-"] for h in happenings
    ]
    print_table(["WHEN", "WHO", "VERSION", "WHAT", "WHY"], rows)


def _happenings(registry: Registry, what: str, limit: int) -> list[Happening]:
    ref = AdapterRef.parse(what)
    if "@" not in what:
        return history(registry.versions(ref.name, limit=limit), registry.logs(ref.name, limit=limit))
    if ref.channel not in {None, "latest"}:
        channel = str(ref.channel)
        return history((), Logs(moves={channel: tuple(registry.channel_log(ref.name, channel))}))
    version = find_version(registry, ref)
    found = history([version], registry.logs(ref.name))
    return [happening for happening in found if version.record.version in happening.versions]


def tree(
    what: Annotated[
        str,
        typer.Argument(
            metavar="TENANT[/ADAPTER[@VERSION]]", help="With an adapter or a version: what it is related to."
        ),
    ],
    registry_url: RegistryOption = None,
    as_json: JsonOption = False,
) -> None:
    """Show which versions were made from which: trained on, merged."""
    registry = open_registry(registry_url or load_settings().registry)
    whole = graph(tenant_overview(registry, AdapterRef.parse(what).name.tenant if "/" in what else what))
    chosen = family(whole, _digests(registry, what)) if "/" in what else whole
    if as_json:
        print_json([_plain(node) for node in chosen.values()])
        return
    for branch in drawn(chosen):
        typer.echo(_line(branch))


def _digests(registry: Registry, what: str) -> list[str]:
    ref = AdapterRef.parse(what)
    if "@" in what:
        return [find_version(registry, ref).record.digest]
    return [version.record.digest for version in registry.versions(ref.name)]


def _plain(node: Node) -> dict[str, Any]:
    return {
        "digest": node.digest,
        "versions": [f"{version.name}@{version.version}" for version in node.versions],
        "parents": list(node.parents),
        "children": list(node.children),
    }


def _line(branch: Branch) -> str:
    lead = ""
    if branch.depth:
        *above, here = branch.last
        lead = "".join("   " if last else "│  " for last in above) + ("└─ " if here else "├─ ")
    node = branch.node
    if not node.versions:
        return f"{lead}{node.digest[: len('sha256:') + 12]}  not here"
    names = " = ".join(f"{version.name}@{version.version}" for version in node.versions)
    first = node.versions[0]
    said = [names, first.method or "unknown method", f"rank {first.rank}"]
    if first.status != "active":
        said.append(first.status)
    return lead + "  ".join([*said, "as above"] if branch.again else said)
