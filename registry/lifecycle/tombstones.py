"""Deleted tenants: nothing stays of them but a tombstone, and the name is never issued again.

    gone/<tenant>.json    first; from now on publishers refuse
    t/<tenant>/           then all of it: records before bytes

A publisher that looked before and commits after looks once more, and clears away what it wrote. Where it is killed in
between, or somebody moves a channel meanwhile, the next collection does it (`gc`).
"""

from __future__ import annotations

from adapterhub.errors import NotFound
from adapterhub.manifest import FORMAT, canonical_json
from adapterhub.registry import layout
from adapterhub.registry.clock import now
from adapterhub.registry.store import Store, create_hint


def is_gone(store: Store, tenant: str) -> bool:
    return store.exists(layout.gone(tenant))


def all_of(store: Store) -> list[str]:
    """Names of deleted tenants, sorted."""
    return [key.removeprefix(layout.GONE).removesuffix(".json") for key in store.keys(layout.GONE)]


def bury(store: Store, tenant: str, *, who: str, why: str) -> None:
    """Delete a tenant, or finish what was broken off. Raises NotFound for one that never was."""
    if not is_gone(store, tenant) and not store.keys(layout.tenant(tenant), limit=1):
        raise NotFound(f"there is no tenant {tenant!r} in {store.url}", hint="ah ls")
    stone = {"format": FORMAT, "tenant": tenant, "who": who, "why": why, "when": now()}
    create_hint(store, layout.gone(tenant), canonical_json(stone))
    clear(store, tenant)


def clear(store: Store, tenant: str) -> None:
    """What a tenant that is gone still has."""
    store.clear(layout.tenant(tenant))
