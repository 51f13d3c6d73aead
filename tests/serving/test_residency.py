"""Leases: what is used stays, what is not makes room, and a load is shared."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from adapterhub.errors import EngineRefused, StorageError
from adapterhub.manifest import Record
from adapterhub.serving.adapters.residency import Places, Residency

pytestmark = pytest.mark.anyio


@given(
    capacity=st.integers(1, 4),
    steps=st.lists(st.tuples(st.sampled_from(["take", "give", "load"]), st.sampled_from("abcdef")), max_size=60),
)
def test_what_is_leased_is_never_idle_and_capacity_holds(capacity: int, steps: list[tuple[str, str]]) -> None:
    places, held = Places(capacity), dict.fromkeys("abcdef", 0)
    for step, name in steps:
        if step == "take":
            places.take(name)
            held[name] += 1
        elif step == "give" and held[name]:
            places.give_back(name)
            held[name] -= 1
        elif step == "load" and not places.is_resident(name):
            if places.is_full and (idle := places.idle()):
                places.drop(idle)
            if not places.is_full:
                places.expect(name)
                places.add(name)
        assert places.idle() is None or held[places.idle()] == 0
        assert (places.idle() is None) == all(held[n] for n in places.resident)
        assert len(places.resident) <= capacity
        assert {n: places.leases(n) for n in held} == held


def test_the_least_recently_used_goes_first() -> None:
    places = Places(3)
    for name in "abc":
        places.expect(name)
        places.add(name)
    places.take("a")
    places.give_back("a")
    assert places.resident == ("b", "c", "a")
    places.take("b")
    assert places.idle() == "c"


Prepare = Callable[[Record], Awaitable[Path]]


@pytest.fixture
def prepare(tmp_path: Path) -> Prepare:
    async def make(record: Record) -> Path:
        folder = tmp_path / record.digest
        folder.mkdir(exist_ok=True)
        (folder / "adapter_config.json").touch()
        return folder

    return make


@pytest.fixture
def residency(engine: Any, prepare: Prepare) -> Residency:
    return Residency(engine, capacity=engine.capacity, prepare=prepare, settle=0)


@pytest.fixture
def records(publish: Callable[..., Record]) -> dict[str, Record]:
    """Four versions; the engine has three places."""
    return {name: publish(f"acme/{name}") for name in "abcd"}


async def test_many_waiters_share_one_load(residency: Residency, engine: Any, records: dict[str, Record]) -> None:
    engine.gate.clear()

    async def use() -> None:
        async with residency.lease(records["a"]):
            assert "acme/a@1" in engine.held

    users = [asyncio.create_task(use()) for _ in range(20)]
    await engine.until(lambda: engine.loads)
    engine.gate.set()
    await asyncio.gather(*users)
    assert engine.loads == ["acme/a@1"]


async def test_cold_adapters_load_side_by_side_each_in_a_place_of_its_own(
    residency: Residency, engine: Any, records: dict[str, Record]
) -> None:
    """Between two steps of the engine: one after another, each would wait for a step of its own."""
    engine.gate.clear()
    loading = [asyncio.create_task(residency.ensure(records[name])) for name in "abcd"]
    await engine.until(lambda: len(engine.loads) == 3)
    engine.gate.set()
    async with asyncio.timeout(10):
        await asyncio.gather(*loading)  # the fourth in the room of one that nobody uses
    assert len(engine.held) == 3


async def test_a_load_that_fails_leaves_its_place_to_who_waits_for_one(
    residency: Residency, engine: Any, records: dict[str, Record]
) -> None:
    engine.gate.clear()
    engine.refused = "acme/c@1"
    async with contextlib.AsyncExitStack() as others:
        loading = {name: asyncio.create_task(residency.ensure(records[name])) for name in "abcd"}
        await engine.until(lambda: len(engine.loads) == 3)
        for name in "abd":
            residency.places.take(str(records[name].ref))
            others.callback(residency.places.give_back, str(records[name].ref))
        engine.gate.set()
        with pytest.raises(EngineRefused):
            await loading.pop("c")
        async with asyncio.timeout(10):
            await asyncio.gather(*loading.values())


async def test_a_client_that_leaves_cancels_nothing(
    residency: Residency, engine: Any, records: dict[str, Record]
) -> None:
    engine.gate.clear()

    async def use() -> None:
        async with residency.lease(records["a"]):
            pass

    leaving, staying = asyncio.create_task(use()), asyncio.create_task(use())
    await engine.until(lambda: engine.loads)
    leaving.cancel()
    with contextlib.suppress(asyncio.CancelledError):
        await leaving
    engine.gate.set()
    await staying
    assert engine.loads == ["acme/a@1"]
    await engine.until(lambda: residency.places.leases("acme/a@1") == 0)


async def test_a_load_goes_on_when_every_client_left(
    residency: Residency, engine: Any, records: dict[str, Record]
) -> None:
    engine.gate.clear()
    only = asyncio.create_task(residency.ensure(records["a"]))
    await engine.until(lambda: engine.loads)
    only.cancel()
    with contextlib.suppress(asyncio.CancelledError):
        await only
    engine.gate.set()
    await engine.until(lambda: residency.places.is_resident("acme/a@1"))


async def test_room_is_made_of_what_nobody_uses(residency: Residency, engine: Any, records: dict[str, Record]) -> None:
    async with residency.lease(records["a"]):
        for name in "bcd":
            await residency.ensure(records[name])
        assert set(engine.held) == {"acme/a@1", "acme/c@1", "acme/d@1"}


async def test_with_everything_in_use_the_next_waits_for_a_last_byte(
    residency: Residency, engine: Any, records: dict[str, Record]
) -> None:
    async with contextlib.AsyncExitStack() as others:
        for name in "bc":
            await others.enter_async_context(residency.lease(records[name]))
        async with residency.lease(records["a"]):
            waiting = asyncio.create_task(residency.ensure(records["d"]))
            for _ in range(100):
                await asyncio.sleep(0)
            assert not waiting.done()
        async with asyncio.timeout(10):
            await waiting
        assert set(engine.held) == {"acme/b@1", "acme/c@1", "acme/d@1"}


async def test_a_lease_ends_after_a_failure_inside(
    residency: Residency, engine: Any, records: dict[str, Record]
) -> None:
    with pytest.raises(RuntimeError):
        async with residency.lease(records["a"]):
            raise RuntimeError
    await engine.until(lambda: residency.places.leases("acme/a@1") == 0)


async def test_the_engine_hears_of_an_end_before_the_adapter_can_go(
    engine: Any, records: dict[str, Record], prepare: Prepare
) -> None:
    slow = Residency(engine, capacity=3, prepare=prepare, settle=3600)
    async with slow.lease(records["a"]):
        pass
    assert slow.places.leases("acme/a@1") == 1


async def test_what_the_engine_refused_is_not_tried_at_once_again(
    engine: Any, prepare: Prepare, records: dict[str, Record]
) -> None:
    """A load holds up everybody's loads: whoever asks for a broken adapter in a loop must not."""
    now = [0.0]
    residency = Residency(engine, capacity=3, prepare=prepare, clock=lambda: now[0])
    engine.refused = "acme/a@1"
    for _ in range(5):
        with pytest.raises(EngineRefused):
            await residency.ensure(records["a"])
    assert engine.loads == ["acme/a@1"]
    await residency.ensure(records["b"])
    engine.refused, now[0] = "", 61
    await residency.ensure(records["a"])
    assert set(engine.held) == {"acme/a@1", "acme/b@1"}


async def test_a_load_that_fails_is_told_to_all_and_tried_again(
    residency: Residency, engine: Any, records: dict[str, Record]
) -> None:
    engine.failure = StorageError("no")
    results = await asyncio.gather(*(residency.ensure(records["a"]) for _ in range(3)), return_exceptions=True)
    assert [type(r) for r in results] == [StorageError] * 3
    assert engine.loads == ["acme/a@1"]
    engine.failure = None
    async with residency.lease(records["a"]):
        assert "acme/a@1" in engine.held


async def test_under_load_nothing_in_use_is_ever_forgotten(
    residency: Residency, engine: Any, records: dict[str, Record]
) -> None:
    """200 requests over four adapters on three places; the engine itself refuses a fourth."""

    async def use(index: int) -> None:
        record = records["abcd"[index * 7 % 4]]
        async with residency.lease(record):
            for _ in range(index % 5):
                await asyncio.sleep(0)
                assert str(record.ref) in engine.held

    async with asyncio.timeout(30):
        await asyncio.gather(*(use(i) for i in range(200)))
