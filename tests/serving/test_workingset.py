"""What a restarted replica takes up again."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from adapterhub.base import BaseModel
from adapterhub.errors import StorageError
from adapterhub.manifest import Record
from adapterhub.refs import AdapterName, AdapterRef
from adapterhub.registry import Registry
from adapterhub.serving.adapters import workingset
from adapterhub.serving.adapters.workingset import WorkingSet
from adapterhub.serving.config import ServeConfig
from adapterhub.serving.replica import Replica

pytestmark = pytest.mark.anyio

Publish = Callable[..., Record]


@pytest.fixture
def restarted(config: ServeConfig, registry: Registry, base: BaseModel, engine: Any) -> Callable[[], Replica]:
    """A replica whose engine holds nothing yet."""

    def start() -> Replica:
        return Replica(config, registry=registry, base=base, engine=type(engine)(config.max_cpu_loras))

    return start


def engine_of(replica: Replica) -> Any:
    return replica.residency._engine


async def test_a_restart_loads_what_was_in_use_and_follows_it(
    restarted: Callable[[], Replica], publish: Publish, registry: Registry, engine: Any
) -> None:
    publish(channel="prod")
    publish("globex/desk")
    publish()
    before = restarted()
    for text in ("acme/support@prod", "globex/desk"):
        version = await before.rollout.current(AdapterRef.parse(text))
        await before.ensure(version.record)
    before.watch()
    await engine.until(lambda: workingset.read(before._working_set_path) == before.working_set())
    for watcher in before._watchers:
        watcher.cancel()

    after = restarted()
    await after.restore()
    assert set(engine_of(after).held) == {"acme/support@1", "globex/desk@1"}
    registry.set_channel(AdapterName.parse("acme/support"), "prod", {2: 100}, who="tests")
    await after.poll()
    assert "acme/support@2" in engine_of(after).held, "the channel is followed before anybody asked for it"


async def test_it_takes_no_more_than_there_is_room_for_the_last_used_first(
    restarted: Callable[[], Replica], publish: Publish
) -> None:
    names = [f"acme/{letter}" for letter in "abcde"]
    for name in names:
        publish(name)
    replica = restarted()
    workingset.write(replica._working_set_path, WorkingSet(tuple(f"{name}@1" for name in names)))
    await replica.restore()
    assert engine_of(replica).loads == ["acme/e@1", "acme/d@1", "acme/c@1"]


async def test_pins_are_kept_over_restarts_and_come_first(restarted: Callable[[], Replica], publish: Publish) -> None:
    names = [f"acme/{letter}" for letter in "abcd"]
    for name in names:
        publish(name)
    replica = restarted()
    replica.residency.places.pin("acme/a@1")
    assert replica.working_set().pins == ("acme/a@1",)
    versions = tuple(f"{name}@1" for name in names)
    workingset.write(replica._working_set_path, WorkingSet(versions, pins=("acme/gone@1", *replica.working_set().pins)))
    after = restarted()
    await after.restore()
    assert engine_of(after).loads == ["acme/a@1", "acme/d@1", "acme/c@1"]
    assert after.working_set().pins == ("acme/a@1",)


async def test_a_registry_that_is_away_at_the_start_costs_no_pin(
    restarted: Callable[[], Replica], publish: Publish, registry: Registry, monkeypatch: pytest.MonkeyPatch
) -> None:
    def away(*args: object, **options: object) -> None:
        raise StorageError("the registry is away")

    publish()
    replica = restarted()
    workingset.write(replica._working_set_path, WorkingSet(pins=("acme/support@1",)))
    monkeypatch.setattr(registry, "changes", away)
    await replica.restore()
    assert replica.working_set().pins == ("acme/support@1",)


async def test_what_is_gone_is_left_out(restarted: Callable[[], Replica], publish: Publish, registry: Registry) -> None:
    publish()
    publish()
    registry.set_status(AdapterName.parse("acme/support"), 1, "yanked", who="tests", why="bad")
    replica = restarted()
    versions = ("acme/support@2", "acme/support@1", "acme/nope@1", "../../etc", "")
    workingset.write(replica._working_set_path, WorkingSet(versions))
    await replica.restore()
    assert set(engine_of(replica).held) == {"acme/support@2"}


@pytest.mark.parametrize("garbage", [b"", b"{", b"[]", b"7", b'{"versions": 3}', b"\xff", b"[" * 100_000])
async def test_garbage_is_no_working_set(restarted: Callable[[], Replica], garbage: bytes) -> None:
    replica = restarted()
    replica._working_set_path.parent.mkdir(parents=True)
    replica._working_set_path.write_bytes(garbage)
    await replica.restore()
    assert not engine_of(replica).loads


def test_each_registry_and_base_has_its_own(tmp_path: Path) -> None:
    paths = {workingset.path_of(tmp_path, registry=r, base=b) for r in ("s3://a", "s3://b") for b in ("x", "y")}
    assert len(paths) == 4
