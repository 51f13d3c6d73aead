"""What a registry over a store asks of it, counted: a request is what a bucket bills and what the network waits for."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from typing import Any

import pytest

from adapterhub.manifest import Record
from adapterhub.refs import AdapterName, AdapterRef
from adapterhub.registry import Draft, ObjectRegistry, layout
from adapterhub.registry.store import create_hint
from adapterhub.serving.rollout.rollout import Rollout

Drafts = Callable[..., Draft]
CHANNELS = [f"c{n}" for n in range(200)]


@pytest.fixture
def store(counting_store: Any) -> Any:
    return counting_store


@pytest.fixture
def registry(store: Any) -> ObjectRegistry:
    return ObjectRegistry(store)


def publish(registry: ObjectRegistry, new_draft: Drafts, *names: AdapterName) -> None:
    for name in names:
        registry.publish(new_draft(), name=name, author="ana")


def test_a_channel_is_resolved_in_four_requests_however_many_versions(
    store: Any, registry: ObjectRegistry, new_draft: Drafts, name: AdapterName
) -> None:
    publish(registry, new_draft, *[name] * 30)
    registry.set_channel(name, "prod", {1: 100}, who="ana")
    fresh = ObjectRegistry(store)
    asked = store.since(lambda: fresh.resolve(AdapterRef.parse(f"{name}@prod")))
    assert [request.split()[0] for request in asked] == ["LIST", "GET", "GET", "LIST"]


def test_tenants_are_found_by_their_first_adapter(store: Any, registry: ObjectRegistry, new_draft: Drafts) -> None:
    publish(registry, new_draft, *[AdapterName("acme", f"a{n}") for n in range(20)], AdapterName("beta", "b"))
    assert len(store.since(registry.tenants)) == 2 + 2 * 2  # who was deleted, the tenants, and of each its adapters


def test_a_tenant_is_found_behind_what_a_killed_publisher_left(
    store: Any, registry: ObjectRegistry, new_draft: Drafts
) -> None:
    create_hint(store, layout.digest(AdapterName("acme", "a"), "sha256:" + "0" * 64, 1))
    assert registry.tenants() == []
    publish(registry, new_draft, AdapterName("acme", "b"))
    assert registry.tenants() == ["acme"]


@pytest.mark.slow
def test_watchers_need_one_list_a_poll_and_what_moved(
    store: Any, registry: ObjectRegistry, new_draft: Drafts, name: AdapterName
) -> None:
    """Ten servers that follow 200 channels each."""
    publish(registry, new_draft, name, name)
    for channel in CHANNELS:
        registry.set_channel(name, channel, {1: 100}, who="ana")

    async def warm(record: Record) -> None:
        pass

    async def blocking(function: Callable[..., Any], *arguments: Any) -> Any:
        return function(*arguments)

    async def watch(monkeypatch: pytest.MonkeyPatch) -> tuple[list[str], list[str]]:
        now = time.time()
        watchers = [Rollout(ObjectRegistry(store), warm=warm, blocking=blocking) for _ in range(10)]
        for watcher in watchers:
            for channel in CHANNELS:
                await watcher.current(AdapterRef(name, channel=channel))
        monkeypatch.setattr("adapterhub.registry.changelog.time.time", lambda: now + 60)  # the moves are no news
        for watcher in watchers:
            await watcher.look()
        monkeypatch.setattr("adapterhub.registry.changelog.time.time", lambda: now + 120)
        store.asked.clear()
        for watcher in watchers:
            await watcher.look()
        quiet = list(store.asked)
        registry.set_channel(name, "c7", {2: 100}, who="ana")
        store.asked.clear()
        for watcher in watchers:
            await watcher.look()
        moved = list(store.asked)
        for watcher in watchers:
            await watcher.settle()
            assert (await watcher.current(AdapterRef(name, channel="c7"))).record.version == 2
        return quiet, moved

    with pytest.MonkeyPatch.context() as patch:
        quiet, moved = asyncio.run(watch(patch))
    assert quiet == ["LIST t/acme/log/"] * 10
    # the look, the one channel read anew, and whether the version before may still answer
    assert len(moved) <= 10 * (1 + 6 + 2)
