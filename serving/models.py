"""``GET /v1/models``, from the registry: the base, and each adapter's names that this server can answer to.

An adapter is listed to those who may use it, bare, by channel and by number; what is yanked, or does not fit this
engine, is not. No paths.
"""

from __future__ import annotations

from collections.abc import Callable
from datetime import datetime
from typing import Any

from adapterhub.errors import AdapterHubError
from adapterhub.manifest import Record
from adapterhub.refs import AdapterName
from adapterhub.registry.base import Registry
from adapterhub.serving.arguments import BASE_NAME
from adapterhub.serving.tenants.callers import Caller

Unfit = Callable[[Record], AdapterHubError | None]


def list_models(registry: Registry, unfit: Unfit, caller: Caller) -> list[dict[str, Any]]:
    """Cards of all adapters that ``caller`` may use, by name. Blocking. Raises StorageError."""
    tenants = registry.tenants() if caller.tenant is None else [caller.tenant]
    names = [name for tenant in tenants for name in registry.adapters(tenant)]
    names += sorted(caller.shared)
    return [entry for name in names for entry in _adapter(registry, name, unfit)]


def base_card(*, created: int, max_model_len: int | None) -> dict[str, Any]:
    """``created`` in seconds since 1970, ``max_model_len`` in tokens."""
    return {
        "id": BASE_NAME,
        "object": "model",
        "created": created,
        "owned_by": "adapterhub",
        "root": BASE_NAME,
        "parent": None,
        "max_model_len": max_model_len,
    }


def card(name: str, record: Record) -> dict[str, Any]:
    """``root`` is the version that the name stands for."""
    return {
        "id": name,
        "object": "model",
        "created": int(datetime.fromisoformat(record.created).timestamp()),
        "owned_by": record.name.tenant,
        "root": str(record.ref),
        "parent": BASE_NAME,
    }


def _adapter(registry: Registry, name: AdapterName, unfit: Unfit) -> list[dict[str, Any]]:
    versions = {v.record.version: v for v in registry.versions(name) if v.status in ("active", "deprecated")}
    usable = {number: v for number, v in versions.items() if unfit(v.record) is None}
    latest = max((number for number, v in versions.items() if v.status == "active"), default=None)
    named = {str(name): latest}
    named |= {f"{name}@{channel}": move.main.version for channel, move in registry.channels(name).items()}
    named |= {f"{name}@{number}": number for number in sorted(usable, reverse=True)}
    return [card(text, usable[number].record) for text, number in named.items() if number in usable]
