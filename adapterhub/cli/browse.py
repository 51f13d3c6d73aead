"""`ah ls` and `ah show`: what is in a registry."""

from __future__ import annotations

from typing import Annotated, Any

import typer

from adapterhub.cli.output import JsonOption, RegistryOption, print_json, print_table
from adapterhub.errors import NotFound
from adapterhub.manifest import to_plain
from adapterhub.refs import AdapterName, AdapterRef, check_tenant
from adapterhub.registry import ChannelMove, Registry, Version, open_registry
from adapterhub.registry.base import Overview
from adapterhub.settings import load_settings


def ls(
    what: Annotated[
        str | None, typer.Argument(metavar="[TENANT[/ADAPTER]]", help="Nothing: all tenants.", show_default=False)
    ] = None,
    registry_url: RegistryOption = None,
    as_json: JsonOption = False,
) -> None:
    """List tenants, a tenant's adapters, or an adapter's versions."""
    registry = open_registry(registry_url or load_settings().registry)
    if what is None:
        rows = _tenants(registry)
    elif "/" in what:
        rows = _versions(registry, AdapterName.parse(what))
    else:
        rows = _adapters(registry, what)
    if as_json:
        print_json(rows)
    elif not rows:
        typer.echo(f"nothing is published in {registry.url} yet", err=True)
    else:
        print_table([key.upper() for key in rows[0]], [[_cell(key, value) for key, value in r.items()] for r in rows])


def show(
    ref: Annotated[str, typer.Argument(metavar="TENANT/ADAPTER[@VERSION]", help="Default: the newest active version.")],
    registry_url: RegistryOption = None,
    as_json: JsonOption = False,
) -> None:
    """Show everything about one version."""
    registry = open_registry(registry_url or load_settings().registry)
    parsed = AdapterRef.parse(ref)
    version = find_version(registry, parsed)
    moves = registry.channels(parsed.name)
    pointing = [channel for channel, move in moves.items() if version.record.version in _pointed(move)]
    evaluations = registry.evaluations(parsed.name, version.record.version)
    if as_json:
        status = {"status": version.status, "status_why": version.why, "channels": pointing}
        measured = {"evaluations": [to_plain(evaluation) for evaluation in evaluations]}
        print_json({"ref": str(version.record.ref), **status, **version.record.to_json(), **measured})
        return
    for key, value in _facts(version, pointing).items():
        typer.echo(f"{key:<11}{value}".rstrip())
    for evaluation in evaluations:
        metrics = ", ".join(f"{name} {value:g}" for name, value in evaluation.metrics.items())
        typer.echo(f"evaluated  {evaluation.suite}: {metrics}  ({evaluation.when} by {evaluation.who})")


def _tenants(registry: Registry) -> list[dict[str, Any]]:
    return [{"tenant": tenant, "adapters": len(registry.overview(tenant))} for tenant in registry.tenants()]


def _adapters(registry: Registry, tenant: str) -> list[dict[str, Any]]:
    return [
        {
            "adapter": str(overview.name),
            "latest": next((v.version for v in overview.versions if v.status == "active"), None),
            "channels": {c: max(targets, key=lambda t: t.weight).version for c, targets in overview.channels.items()},
        }
        for overview in tenant_overview(registry, tenant)
    ]


def tenant_overview(registry: Registry, tenant: str) -> list[Overview]:
    """Raises NotFound for a tenant without a version."""
    check_tenant(tenant)
    if found := registry.overview(tenant):
        return found
    raise NotFound(f"there is no tenant {tenant!r} in {registry.url}", hint="ah ls")


def _versions(registry: Registry, name: AdapterName) -> list[dict[str, Any]]:
    moves = registry.channels(name)
    return [
        {
            "version": v.record.version,
            "status": v.status,
            "channels": [channel for channel, move in moves.items() if v.record.version in _pointed(move)],
            "serve": v.record.verdicts.serve.answer,
            "rank": v.record.manifest.lora.rank,
            "size": v.record.manifest.size,
            "created": v.record.created,
            "author": v.record.author,
            "digest": v.record.digest,
        }
        for v in registry.versions(name)
    ]


def find_version(registry: Registry, ref: AdapterRef) -> Version:
    """Like `resolve`, but what is yanked or deleted can be looked at too."""
    if not ref.is_fixed:
        return registry.resolve(ref)
    if ref.version is not None:
        return registry.version(ref.name, ref.version)
    for version in registry.versions(ref.name):
        if version.record.digest == ref.digest:
            return version
    raise NotFound(f"{ref.name} has no version {ref.selector}", hint=f"ah ls {ref.name}")


def _pointed(move: ChannelMove) -> set[int]:
    return {target.version for target in move.targets}


def _facts(version: Version, channels: list[str]) -> dict[str, str]:
    record, manifest = version.record, version.record.manifest
    lora, base, lineage = manifest.lora, manifest.base, manifest.lineage
    facts = {
        "version": str(record.ref),
        "digest": record.digest,
        "status": f"{version.status}  {version.why}",
        "channels": ", ".join(channels) or "none",
        "created": f"{record.created} by {record.author}",
        "base": f"{base.name} ({base.dtype}, {base.parameters:,} parameters)" if base else "unknown",
        "lora": f"rank {lora.rank}, alpha {lora.alpha:g}, {', '.join(lora.target_modules)}",
        "method": lineage.method or "unknown",
        "metrics": ", ".join(f"{k} {v:g}" for k, v in lineage.metrics.items()) or "none",
        "labels": ", ".join(f"{k}={v}" for k, v in record.labels.items()) or "none",
    }
    facts |= {
        f"{use}": f"{verdict['answer']}  {verdict['reason']}" for use, verdict in to_plain(record.verdicts).items()
    }
    files = {f"file {i}": f"{f.path}  {shown_bytes(f.size)}  {f.sha256}" for i, f in enumerate(manifest.files, start=1)}
    return facts | files


def _cell(key: str, value: Any) -> str:
    if isinstance(value, dict):
        return " ".join(f"{k}={v}" for k, v in value.items()) or "-"
    if isinstance(value, list):
        return " ".join(value) or "-"
    if key == "size":
        return shown_bytes(value)
    if key == "digest":
        return str(value)[: len("sha256:") + 12]
    return "-" if value is None else str(value)


def shown_bytes(size: float) -> str:
    for unit in ("B", "kB", "MB"):
        if size < 1000:
            return f"{size:.3g} {unit}"
        size /= 1000
    return f"{size:.3g} GB"
