"""Names that move while requests are under way: warm first, then flip; yanks at once; a registry that is away."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any

import pytest

from adapterhub.errors import Gone, IntegrityError, NotFound, StorageError, Unsupported
from adapterhub.manifest import Record
from adapterhub.refs import AdapterName, AdapterRef
from adapterhub.registry import Registry, draft, open_registry
from adapterhub.serving.replica import Replica
from adapterhub.serving.rollout.rollout import Rollout

pytestmark = pytest.mark.anyio

PROD = AdapterRef.parse("acme/support@prod")
NAME = AdapterName.parse("acme/support")
Publish = Callable[..., Record]


async def number(replica: Replica, ref: AdapterRef | str = PROD) -> int:
    ref = AdapterRef.parse(ref) if isinstance(ref, str) else ref
    return (await replica.rollout.current(ref)).record.version


@pytest.fixture
def two(publish: Publish) -> None:
    """Versions 1 and 2; ``prod`` is 1."""
    publish(channel="prod")
    publish()


def move(registry: Registry, version: int) -> None:
    registry.set_channel(NAME, "prod", {version: 100}, who="tests")


@pytest.mark.usefixtures("two")
class TestHotSwap:
    async def test_a_name_flips_when_the_new_version_is_loaded_and_not_before(
        self, replica: Replica, registry: Registry, engine: Any
    ) -> None:
        async with replica.residency.lease((await replica.rollout.current(PROD)).record):
            engine.gate.clear()
            move(registry, 2)
            await replica.rollout.look()
            await engine.until(lambda: "acme/support@2" in engine.loads)
            assert await number(replica) == 1
            assert replica.rollout.pointers[0].wanted.main.record.version == 2
            engine.gate.set()
            await replica.rollout.settle()
            assert await number(replica) == 2
            assert set(engine.held) == {"acme/support@1", "acme/support@2"}

    async def test_back_again(self, replica: Replica, registry: Registry, engine: Any) -> None:
        assert await number(replica) == 1
        for version in (2, 1, 2, 1):
            move(registry, version)
            await replica.poll()
            assert await number(replica) == version
        assert engine.loads.count("acme/support@2") == 1, "the old version stays loaded for a rollback"

    async def test_a_channel_that_moves_on_while_warming_ends_where_it_points(
        self, replica: Replica, registry: Registry, publish: Publish, engine: Any
    ) -> None:
        publish()
        assert await number(replica) == 1
        engine.gate.clear()
        move(registry, 2)
        await replica.rollout.look()
        await engine.until(lambda: "acme/support@2" in engine.loads)
        move(registry, 3)
        await replica.rollout.look()
        engine.gate.set()
        await replica.rollout.settle()
        assert await number(replica) == 3

    async def test_latest_and_the_bare_name_move_with_a_publish(
        self, replica: Replica, publish: Publish, engine: Any
    ) -> None:
        assert await number(replica, "acme/support") == 2
        publish()
        await replica.poll()
        assert await number(replica, "acme/support@latest") == 3
        assert "acme/support@3" in engine.held

    async def test_numbers_and_digests_never_move(self, replica: Replica, registry: Registry) -> None:
        digest = registry.resolve(AdapterRef.parse("acme/support@1")).record.digest
        assert await number(replica, "acme/support@1") == await number(replica, f"acme/support@{digest}") == 1
        move(registry, 2)
        await replica.poll()
        assert await number(replica, "acme/support@1") == await number(replica, f"acme/support@{digest}") == 1

    async def test_a_version_that_cannot_be_loaded_leaves_the_old_one_in_place(
        self, replica: Replica, registry: Registry, engine: Any
    ) -> None:
        async with replica.residency.lease((await replica.rollout.current(PROD)).record):
            pass
        engine.failure = StorageError("the disk is full")
        move(registry, 2)
        await replica.poll()
        assert await number(replica) == 1
        assert "disk" in replica.rollout.pointers[0].problem
        engine.failure = None
        await replica.poll()
        assert await number(replica) == 2
        assert not replica.rollout.pointers[0].problem

    async def test_the_watcher_finds_a_move_by_itself(self, replica: Replica, registry: Registry, engine: Any) -> None:
        assert await number(replica) == 1
        watcher = asyncio.create_task(replica.rollout.watch(poll_seconds=0.001, rescan_seconds=3600))
        try:
            move(registry, 2)
            await engine.until(lambda: replica.rollout.pointers[0].ready.main.record.version == 2)
        finally:
            watcher.cancel()


@pytest.mark.usefixtures("two")
class TestShares:
    CALLERS = tuple(f"acme\0user-{n}" for n in range(40))

    async def numbers(self, replica: Replica) -> list[int]:
        return [(await replica.rollout.current(PROD, caller)).record.version for caller in self.CALLERS]

    async def test_callers_move_when_both_versions_are_loaded(
        self, replica: Replica, registry: Registry, engine: Any
    ) -> None:
        assert set(await self.numbers(replica)) == {1}
        registry.set_channel(NAME, "prod", {1: 50, 2: 50}, who="tests")
        engine.gate.clear()
        await replica.rollout.look()
        await engine.until(lambda: engine.loads)
        assert set(await self.numbers(replica)) == {1}
        engine.gate.set()
        await replica.rollout.settle()
        assert set(engine.held) == {"acme/support@1", "acme/support@2"}
        shared = await self.numbers(replica)
        assert set(shared) == {1, 2}
        assert await self.numbers(replica) == shared

    async def test_a_candidate_that_cannot_be_loaded_gets_nobody(
        self, replica: Replica, registry: Registry, engine: Any
    ) -> None:
        assert await number(replica) == 1
        engine.failure = Unsupported("the engine refuses it")
        registry.set_channel(NAME, "prod", {1: 50, 2: 50}, who="tests")
        await replica.poll()
        assert set(await self.numbers(replica)) == {1}
        assert "refuses" in replica.rollout.pointers[0].problem

    async def test_a_yanked_candidate_gives_its_callers_back(self, replica: Replica, registry: Registry) -> None:
        registry.set_channel(NAME, "prod", {1: 50, 2: 50}, who="tests")
        assert set(await self.numbers(replica)) == {1, 2}
        registry.set_status(NAME, 2, "yanked", who="tests", why="bad")
        await replica.rollout.look()
        assert set(await self.numbers(replica)) == {1}
        registry.set_status(NAME, 1, "yanked", who="tests", why="bad too")
        await replica.rollout.look()
        with pytest.raises(Gone):
            await number(replica)


@pytest.mark.usefixtures("two")
class TestYank:
    async def test_a_yanked_version_is_refused_by_every_name_with_its_reason(
        self, replica: Replica, registry: Registry
    ) -> None:
        names = ["acme/support@2", "acme/support", "acme/support@prod"]
        assert [await number(replica, n) for n in names] == [2, 2, 1]
        registry.set_status(NAME, 2, "yanked", who="tests", why="leaks prices")
        await replica.rollout.look()
        await replica.rollout.settle()
        with pytest.raises(Gone, match="leaks prices"):
            await number(replica, "acme/support@2")
        assert await number(replica, "acme/support") == 1
        registry.set_status(NAME, 2, "active", who="tests")
        await replica.poll()
        assert await number(replica, "acme/support@2") == 2

    async def test_a_channel_moved_off_a_yanked_version_does_not_wait_for_the_load(
        self, replica: Replica, registry: Registry, engine: Any
    ) -> None:
        assert await number(replica) == 1
        engine.gate.clear()
        move(registry, 2)
        registry.set_status(NAME, 1, "yanked", who="tests", why="bad")
        await replica.rollout.look()
        assert await number(replica) == 2
        engine.gate.set()

    async def test_a_channel_on_a_yanked_version_is_refused(self, replica: Replica, registry: Registry) -> None:
        assert await number(replica) == 1
        registry.set_status(NAME, 1, "yanked", who="tests", why="bad")
        await replica.rollout.look()
        with pytest.raises(Gone, match="bad"):
            await number(replica)

    async def test_deprecation_arrives(self, replica: Replica, registry: Registry) -> None:
        assert (await replica.rollout.current(PROD)).status == "active"
        registry.set_status(NAME, 1, "deprecated", who="tests", why="use 2")
        await replica.rollout.look()
        version = await replica.rollout.current(PROD)
        assert (version.status, version.why) == ("deprecated", "use 2")


@pytest.mark.usefixtures("two")
class TestRegistryAway:
    @pytest.fixture
    def away(self, registry: Registry) -> AwayRegistry:
        return AwayRegistry(registry)

    @pytest.fixture
    def rollout(self, away: AwayRegistry) -> Rollout:
        async def warm(record: Record) -> None:
            pass

        async def blocking(function: Callable[..., Any], *args: Any) -> Any:
            return await asyncio.to_thread(function, *args)

        return Rollout(away, warm=warm, blocking=blocking)  # type: ignore[arg-type]

    async def test_what_is_known_goes_on_and_the_watcher_lives(
        self, rollout: Rollout, away: AwayRegistry, registry: Registry, engine: Any, caplog: pytest.LogCaptureFixture
    ) -> None:
        assert (await rollout.current(PROD)).record.version == 1
        away.is_away = True
        watcher = asyncio.create_task(rollout.watch(poll_seconds=0.001, rescan_seconds=0.002))
        try:
            await engine.until(lambda: away.refused > 5)
            assert (await rollout.current(PROD)).record.version == 1
            with pytest.raises(StorageError):
                await rollout.current(AdapterRef.parse("acme/support@2"))
            move(registry, 2)
            away.is_away = False
            await engine.until(lambda: rollout.pointers[0].ready.main.record.version == 2)
        finally:
            watcher.cancel()
        assert [r.getMessage()[:31] for r in caplog.records if "registry can" in r.getMessage()] == [
            "the registry cannot be read; wh",
            "the registry can be read again",
        ]


async def test_a_registry_folder_that_vanishes_withdraws_nothing(
    replica: Replica, publish: Publish, registry: Registry, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An unmounted folder looks like an empty registry. Versions are never deleted, so it is none."""
    publish(channel="prod")
    assert await number(replica) == await number(replica, "acme/support@1") == 1
    empty = open_registry(f"{registry.url}/vanished")
    monkeypatch.setattr(replica.rollout, "_registry", empty)
    await replica.poll()
    assert await number(replica) == await number(replica, "acme/support@1") == 1


async def test_a_registry_that_was_replaced_is_not_believed(
    replica: Replica, publish: Publish, registry: Registry, monkeypatch: pytest.MonkeyPatch, adapter_factory: Any
) -> None:
    """Somebody deleted the folder and published anew: version 1 has other bytes, the engine holds the old ones."""
    old = publish()
    async with replica.residency.lease(old):
        pass
    assert await number(replica, "acme/support") == 1
    another = open_registry(f"{registry.url}/another")
    new = another.publish(draft(adapter_factory("new", seed=99), base=replica.base), name=NAME, author="tests")
    monkeypatch.setattr(replica.rollout, "_registry", another)
    await replica.poll()
    assert (await replica.rollout.current(AdapterRef.parse("acme/support"))).record.digest == old.digest
    with pytest.raises(IntegrityError, match="other bytes"):
        await replica.residency.ensure(new)


class AwayRegistry:
    """A registry behind a network that can be cut."""

    def __init__(self, registry: Registry) -> None:
        self._registry = registry
        self.is_away = False
        self.refused = 0

    def __getattr__(self, name: str) -> Any:
        if self.is_away:
            self.refused += 1
            raise StorageError("the registry is away")
        return getattr(self._registry, name)


async def test_what_is_not_there_leaves_no_trace(replica: Replica, publish: Publish) -> None:
    publish()
    for text in (
        "acme/nope",
        "acme/support@9",
        "acme/support@canary",
        "nobody/nothing",
        "acme/support@sha256:" + "0" * 64,
    ):
        with pytest.raises(NotFound):
            await number(replica, text)
    assert not replica.rollout.pointers
    publish()
    publish("nobody/nothing")
    await replica.rollout.look()
    assert await number(replica, "nobody/nothing") == 1


async def test_what_is_not_there_is_looked_up_once_a_poll(
    replica: Replica, publish: Publish, registry: Registry, monkeypatch: pytest.MonkeyPatch
) -> None:
    publish()
    asked: list[AdapterRef] = []
    resolve = registry.resolve
    monkeypatch.setattr(registry, "resolve", lambda ref: (asked.append(ref), resolve(ref))[1])
    monkeypatch.setattr("adapterhub.serving.rollout.rollout._MOST_UNKNOWN", 2)
    for _ in range(3):
        for adapter in ("a", "b", "c"):
            with pytest.raises(NotFound):
                await number(replica, f"acme/{adapter}")
    assert sorted(ref.name.adapter for ref in asked) == ["a", "b", "c", "c", "c"], "memory is bounded"
    publish("acme/a")
    await replica.rollout.look()
    assert await number(replica, "acme/a") == 1


async def test_many_first_requests_ask_the_registry_once(replica: Replica, publish: Publish) -> None:
    publish(channel="prod")
    versions = await asyncio.gather(*(replica.rollout.current(PROD) for _ in range(50)))
    assert len({id(v) for v in versions}) == 1
