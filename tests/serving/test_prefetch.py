"""What is copied while the engine starts, in which order, and how much of it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from adapterhub.manifest import Record
from adapterhub.refs import AdapterName
from adapterhub.registry import Registry
from adapterhub.registry.cache import Cache
from adapterhub.serving.adapters.prefetch import Prefetch, likely
from adapterhub.serving.adapters.workingset import WorkingSet

SECONDS = 60  # for a few small files


@pytest.fixture
def cache(registry: Registry, tmp_path: Path) -> Cache:
    return Cache(tmp_path / "copies", registry)


def names(records: object) -> list[str]:
    return [str(record.ref) for record in records]  # type: ignore[attr-defined]


def everything(record: Record) -> bool:
    return True


def test_by_use_first_and_then_what_channels_mean(registry: Registry, publish: Callable[..., Record]) -> None:
    publish("acme/bot", channel="prod")
    publish("acme/bot")
    publish("globex/desk")
    publish("globex/old")
    registry.set_status(AdapterName.parse("globex/old"), 1, "yanked", who="tests", why="wrong")
    working = WorkingSet(versions=("acme/bot@2", "globex/desk@1"), references=("../etc", "acme/none"), pins=())
    assert names(likely(registry, working, fits=everything, most=9)) == ["globex/desk@1", "acme/bot@2", "acme/bot@1"]
    assert names(likely(registry, WorkingSet(), fits=everything, most=2)) == ["acme/bot@2", "acme/bot@1"]
    assert names(likely(registry, working, fits=lambda r: r.name.tenant == "acme", most=1)) == ["acme/bot@2"]


def test_it_is_there_when_somebody_asks(registry: Registry, publish: Callable[..., Record], cache: Cache) -> None:
    record = publish("acme/bot")
    with Prefetch(cache, likely(registry, WorkingSet(), fits=everything, most=4)) as prefetch:
        prefetch.wait(SECONDS)
    assert prefetch.count == 1 and cache.is_present(record)


def test_no_more_than_there_is_room_for(publish: Callable[..., Record], cache: Cache) -> None:
    records = [publish(f"acme/{name}") for name in "abc"]
    room = records[0].manifest.size + records[1].manifest.size
    with Prefetch(cache, records, room=room) as prefetch:
        prefetch.wait(SECONDS)
    assert [cache.is_present(record) for record in records] == [True, True, False]


def test_one_that_cannot_be_fetched_keeps_no_other_from_it(
    publish: Callable[..., Record], cache: Cache, registry: Registry
) -> None:
    gone, whole = publish("globex/gone"), publish("acme/whole")
    registry.delete_tenant("globex", who="tests")
    with Prefetch(cache, [gone, whole]) as prefetch:
        prefetch.wait(SECONDS)
    assert prefetch.count == 1 and cache.is_present(whole)


def test_nothing_is_begun_once_it_is_over(publish: Callable[..., Record], cache: Cache) -> None:
    record = publish("acme/bot")

    def records() -> object:
        prefetch.__exit__(None, None, None)
        yield record

    prefetch = Prefetch(cache, records())  # type: ignore[arg-type]
    with prefetch:
        prefetch.wait(SECONDS)
    assert prefetch.count == 0 and not cache.is_present(record)
