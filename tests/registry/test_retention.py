"""Which versions the rules keep, and why."""

from __future__ import annotations

from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest

from adapterhub.errors import Gone, NotFound, UsageError
from adapterhub.refs import AdapterName
from adapterhub.registry import ChannelMove, Draft, ObjectRegistry, Registry, Target, Version
from adapterhub.registry.lifecycle.retention import Policy, decide, retain
from adapterhub.registry.memory import MemoryStore

NOW = datetime(2026, 6, 1, tzinfo=UTC)


@pytest.fixture
def versions(new_draft: Callable[..., Draft], name: AdapterName) -> list[Version]:
    """Six, newest first."""
    registry = ObjectRegistry(MemoryStore())
    for _ in range(6):
        registry.publish(new_draft("same"), name=name, author="ana")
    registry.set_status(name, 5, "yanked", who="ana")
    return registry.versions(name)


def moves(*steps: tuple[int, int]) -> list[ChannelMove]:
    """(version, days ago), oldest first; returned newest first."""
    made = [
        ChannelMove(
            "prod", seq, (Target(version, "d"),), "set", "", "ana", (NOW - timedelta(days=ago)).isoformat(), f"{seq}"
        )
        for seq, (version, ago) in enumerate(steps, start=1)
    ]
    return made[::-1]


def kept(decisions: Any) -> list[int]:
    return [one.version for one in decisions if one.keep]


def test_the_last_in_use_are_kept(versions: list[Version]) -> None:
    assert kept(decide(Policy(2, 0), versions, {}, now=NOW)) == [6, 5, 4]  # the yanked one does not count
    assert kept(decide(Policy(10, 0), versions, {}, now=NOW)) == [6, 5, 4, 3, 2, 1]


def test_what_a_channel_points_at_is_kept_always(versions: list[Version]) -> None:
    logs = {"prod": moves((1, 900))}
    assert kept(decide(Policy(1, 0), versions, logs, now=NOW)) == [6, 1]
    (one,) = [d for d in decide(Policy(1, 0), versions, logs, now=NOW) if d.version == 1]
    assert one.why == "the channel prod points at it"


def test_what_a_channel_left_is_kept_for_days(versions: list[Version]) -> None:
    logs = {"prod": moves((1, 300), (2, 50), (3, 20), (6, 10))}  # 1 until 50 days ago, 2 until 20, 3 until 10
    assert kept(decide(Policy(1, 15), versions, logs, now=NOW)) == [6, 3]
    assert kept(decide(Policy(1, 30), versions, logs, now=NOW)) == [6, 3, 2]
    assert kept(decide(Policy(1, 60), versions, logs, now=NOW)) == [6, 3, 2, 1]
    why = {one.version: one.why for one in decide(Policy(1, 15), versions, logs, now=NOW)}
    assert why[3] == "the channel prod left it 10 days ago, less than 15"
    assert why[1] == "not among the last 1, and the channel prod left it 50 days ago"
    assert why[4] == "not among the last 1, and no channel ever pointed at it"


@pytest.mark.parametrize(("last", "days"), [(0, 1), (-1, 1), (1, -1), (1, float("nan")), (1, float("inf"))])
def test_rules_that_are_none(last: int, days: float) -> None:
    with pytest.raises(UsageError):
        Policy(last, days)


def test_versions_are_deleted_in_every_registry(
    every_registry: Registry, new_draft: Callable[..., Draft], name: AdapterName
) -> None:
    for _ in range(3):
        every_registry.publish(new_draft(), name=name, author="ana")
    every_registry.set_channel(name, "prod", {1: 100}, who="ana")
    assert kept(retain(every_registry, name, Policy(1, 0), who="ana", dry_run=True)) == [3, 1]
    assert {v.status for v in every_registry.versions(name)} == {"active"}
    assert kept(retain(every_registry, name, Policy(1, 0), who="ana")) == [3, 1]
    found = {v.record.version: v for v in every_registry.versions(name)}
    assert {n: v.status for n, v in found.items()} == {3: "active", 2: "deleted", 1: "active"}
    assert "no channel ever pointed at it" in found[2].why
    assert kept(retain(every_registry, name, Policy(1, 0), who="ana")) == [3, 1]
    with pytest.raises(NotFound):
        retain(every_registry, AdapterName("acme", "nothing"), Policy(1, 0), who="ana")


class Interrupted(ObjectRegistry):
    """Somebody else acts right after a version was yanked."""

    def __init__(self, store: MemoryStore, then: Callable[[], object]) -> None:
        super().__init__(store)
        self._then = then

    def set_status(self, *arguments: Any, **options: Any) -> Any:
        change = super().set_status(*arguments, **options)
        if change.status == "yanked":
            self._then()
        return change


def test_a_channel_that_just_moved_there_keeps_it(new_draft: Callable[..., Draft], name: AdapterName) -> None:
    store = MemoryStore()
    registry = ObjectRegistry(store)
    for _ in range(2):
        registry.publish(new_draft(), name=name, author="ana")
    move = ChannelMove("prod", 1, (Target(1, "d"),), "set", "", "ben", NOW.isoformat(), "op")
    late = Interrupted(store, lambda: registry._moves(name, "prod").append(move))  # its check was before the yank
    one, two = retain(late, name, Policy(1, 0), who="ana")[::-1]
    assert (one.keep, two.keep) == (True, True)
    assert one.why == "the channel prod was just moved to it"
    assert registry.version(name, 1).status == "active"


def test_a_mover_that_was_too_late_knows(new_draft: Callable[..., Draft], name: AdapterName) -> None:
    class Deleted(ObjectRegistry):
        def _append(self, name: AdapterName, move: ChannelMove) -> bool:
            registry.set_status(name, 1, "deleted", who="ana")
            return super()._append(name, move)

    store = MemoryStore()
    registry = ObjectRegistry(store)
    registry.publish(new_draft(), name=name, author="ana")
    with pytest.raises(Gone, match="deleted while the channel 'prod' moved"):
        Deleted(store).set_channel(name, "prod", {1: 100}, who="ben")


class LateYank(ObjectRegistry):
    """Somebody yanks a version between this mover's look and its move."""

    def __init__(self, store: MemoryStore, *versions: int) -> None:
        super().__init__(store)
        self._versions = list(versions)

    def _append(self, name: AdapterName, move: ChannelMove) -> bool:
        if self._versions:
            ObjectRegistry(self.store).set_status(name, self._versions.pop(0), "yanked", who="bo", why="rude")
        return super()._append(name, move)


@pytest.fixture
def deployed(new_draft: Callable[..., Draft], name: AdapterName) -> MemoryStore:
    """Versions 1 to 4, deployed one after another."""
    store = MemoryStore()
    registry = ObjectRegistry(store)
    for version in range(1, 5):
        registry.publish(new_draft(), name=name, author="ana")
        registry.set_channel(name, "prod", {version: 100}, who="ana")
    return store


def test_a_rollback_goes_further_where_its_target_was_just_yanked(deployed: MemoryStore, name: AdapterName) -> None:
    assert LateYank(deployed, 3, 2).rollback(name, "prod", who="ben").main.version == 1
    assert ObjectRegistry(deployed).resolve(name.at("prod")).record.version == 1


def test_a_rollback_to_a_version_that_was_just_yanked_is_told(deployed: MemoryStore, name: AdapterName) -> None:
    with pytest.raises(Gone, match="yanked while the channel 'prod' moved"):
        LateYank(deployed, 2).rollback(name, "prod", to=2, who="ben")
    assert ObjectRegistry(deployed).rollback(name, "prod", who="ben").main.version == 1
