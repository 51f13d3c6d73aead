"""The registry: immutable versions, movable channels, no server.

    from adapterhub.registry import AdapterName, AdapterRef, Cache, draft, open_registry

    registry = open_registry("file:///srv/adapters")
    record = registry.publish(draft(Path("runs/support")), name=AdapterName.parse("acme/support"), author="ana")
    registry.set_channel(record.name, "prod", {record.version: 100}, who="ana")

    version = registry.resolve(AdapterRef.parse("acme/support@prod"))
    folder = Cache(Path("/var/cache/ah"), registry).fetch(version.record)

The object store is the registry: everything is one primitive, "create this key unless it exists". A version becomes
visible with the creation of its record, whole; a channel is a log of moves, so history and rollback come for free.

    drafts  ──►  objects  ──►  store                    cache
    a folder     all rules     local.py, memory.py      verified copies
    judged       (channels)    create-if-absent         for servers and `ah pull`

Where next: `base` (what is promised), `layout` (the drawing of the bucket), `objects` (the rules). In rooms of their
own: `s3`, the store in a bucket; `hub`, a registry on the Hugging Face Hub; `lifecycle`, what ends and is collected;
`moving`, from one registry to another; `views`, what a person asks.
"""

from __future__ import annotations

from pathlib import Path
from urllib.parse import unquote, urlsplit

from adapterhub.errors import Unsupported, UsageError
from adapterhub.refs import AdapterName, AdapterRef
from adapterhub.registry.base import Changes, ChannelMove, Draft, Event, Registry, Status, StatusChange, Target, Version
from adapterhub.registry.cache import Cache, fetch_folder
from adapterhub.registry.drafts import draft
from adapterhub.registry.objects import ObjectRegistry
from adapterhub.registry.store import Store

__all__ = [
    "AdapterName",
    "AdapterRef",
    "Cache",
    "Changes",
    "ChannelMove",
    "Draft",
    "Event",
    "ObjectRegistry",
    "Registry",
    "Status",
    "StatusChange",
    "Store",
    "Target",
    "Version",
    "draft",
    "fetch_folder",
    "open_registry",
    "open_store",
]


def open_registry(url: str) -> Registry:
    """A registry by its URL: ``file:///srv/adapters``, a plain path, ``s3://bucket/prefix``, ``hf://org`` or
    ``memory://name``. Touches nothing yet.

    Raises Unsupported for a kind of store that this version does not know, UsageError for what is no address.
    """
    if url.startswith("hf://"):
        from adapterhub.registry.hub.layout import check_org
        from adapterhub.registry.hub.registry import HubRegistry

        return HubRegistry(check_org(url))
    return ObjectRegistry(open_store(url))


def open_store(url: str) -> Store:
    """What is under `open_registry`, for those who look after stores (`doctor.prove`)."""
    scheme = urlsplit(url).scheme if "://" in url else ""
    if scheme == "memory":
        from adapterhub.registry.memory import memory_store

        return memory_store(url.partition("://")[2])
    if scheme == "s3":
        from adapterhub.registry.s3.address import parse
        from adapterhub.registry.s3.store import S3Store

        return S3Store(parse(url))
    if scheme == "hf":
        raise Unsupported(
            f"{url} is no store of objects",
            why="a registry on the Hub is made of repositories; the Hub itself creates each tag once",
            hint=f"ah ls --registry {url}",
        )
    if scheme not in {"", "file"} or not url or "\0" in url:
        raise UsageError(
            f"{url!a} is no registry", why="a registry is file:///folder", hint="--registry file:///srv/reg"
        )
    from adapterhub.registry.local import LocalStore

    return LocalStore(_folder(url) if scheme else Path(url))


def _folder(url: str) -> Path:
    parts = urlsplit(url)
    if parts.netloc not in {"", "localhost"} or not parts.path:
        raise UsageError(
            f"{url!a} is no folder of this machine",
            why=f"after file:// stands a host, {parts.netloc!a}" if parts.netloc else "it names no folder",
            hint="write it with three slashes: file:///srv/adapters",
        )
    return Path(unquote(parts.path))
