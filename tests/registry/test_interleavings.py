"""Several writers on one registry, in every order that hypothesis can think of, some of them killed on the way.

Each writer runs in a thread of its own, but only one moves at a time, and only by one primitive of the store: the
test says who is next. A writer may be killed between two primitives, or lose the reply to a create that went through.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any, BinaryIO

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from adapterhub.errors import AlreadyExists, Conflict
from adapterhub.manifest import Record
from adapterhub.refs import AdapterName
from adapterhub.registry import ChannelMove, Draft, ObjectRegistry
from adapterhub.registry.memory import MemoryStore

NAME = AdapterName("acme", "support")
PATIENCE = 20  # seconds: a writer that does not come back is a bug of the test
ORDERS = settings(max_examples=20, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
MANY_ORDERS = settings(ORDERS, max_examples=150)


class Killed(BaseException):
    """What a writer feels of its SIGKILL: nothing that it could catch."""


class Stepped(MemoryStore):
    """The shared store as one writer sees it: each primitive waits for its turn."""

    def __init__(self, shared: MemoryStore) -> None:
        super().__init__()
        self._shared = shared
        self._turn = threading.Semaphore(0)
        self._paused = threading.Semaphore(0)
        self._next = "step"
        self.alive = True
        self.outcome: Any = None

    def run(self, work: Callable[[ObjectRegistry], Any]) -> None:
        """In the writer's thread: pause before the first step, then do the work."""
        try:
            self.outcome = work(ObjectRegistry(self, wait=lambda _: None))
        except (Killed, Conflict) as error:
            self.outcome = error
        finally:
            self.alive = False
            self._paused.release()

    def go(self, how: str) -> None:
        """In the test: let the writer do one primitive, and wait until it wants the next."""
        self._next = how
        self._turn.release()
        self.wait_paused()

    def wait_paused(self) -> None:
        assert self._paused.acquire(timeout=PATIENCE)

    def _step(self) -> str:
        self._paused.release()
        assert self._turn.acquire(timeout=PATIENCE)
        if self._next == "kill":
            raise Killed
        return self._next

    def create(self, key: str, value: bytes, *, lasting: bool = True) -> None:
        how = self._step()
        self._shared.create(key, value, lasting=lasting)
        if how == "kill after":
            raise Killed
        if how == "lose the reply":  # the client's own retry then meets what it created
            raise AlreadyExists(key)

    def create_file(self, key: str, source: BinaryIO, *, size: int, sha256: str) -> None:
        self._step()
        self._shared.create_file(key, source, size=size, sha256=sha256)

    def read(self, key: str) -> bytes:
        self._step()
        return self._shared.read(key)

    def exists(self, key: str) -> bool:
        self._step()
        return self._shared.exists(key)

    def keys(self, prefix: str, *, after: str = "", limit: int | None = None) -> list[str]:
        self._step()
        return self._shared.keys(prefix, after=after, limit=limit)


def interleave(shared: MemoryStore, works: list[Callable[[ObjectRegistry], Any]], data: st.DataObject) -> list[Any]:
    """Run the writers step by step in a drawn order; returns what became of each."""
    plan = data.draw(
        st.lists(
            st.tuples(st.integers(0, 100), st.sampled_from(["step"] * 12 + ["kill", "kill after", "lose the reply"])),
            max_size=60,
        )
    )
    writers = [Stepped(shared) for _ in works]
    threads = [threading.Thread(target=w.run, args=(work,)) for w, work in zip(writers, works, strict=True)]
    for thread, writer in zip(threads, writers, strict=True):
        thread.start()
        writer.wait_paused()
    moves = iter(plan)
    while alive := [writer for writer in writers if writer.alive]:
        who, how = next(moves, (0, "step"))
        alive[who % len(alive)].go(how)
    for thread in threads:
        thread.join(PATIENCE)
    return [writer.outcome for writer in writers]


def fresh(draft: Draft) -> tuple[MemoryStore, ObjectRegistry]:
    """A registry of two versions, made at one go."""
    shared = MemoryStore()
    registry = ObjectRegistry(shared)
    for _ in range(2):
        registry.publish(draft, name=NAME, author="first")
    return shared, registry


def was_killed(outcome: Any) -> bool:
    return isinstance(outcome, Killed)


@ORDERS
@given(data=st.data(), writers=st.integers(2, 4))
def test_publishers_get_contiguous_numbers_and_lose_nothing(
    new_draft: Callable[..., Draft], tmp_path: Path, data: st.DataObject, writers: int
) -> None:
    publishers_lose_nothing(new_draft, tmp_path, data, writers)


@pytest.mark.slow
@MANY_ORDERS
@given(data=st.data(), writers=st.integers(2, 4))
def test_publishers_in_many_orders(
    new_draft: Callable[..., Draft], tmp_path: Path, data: st.DataObject, writers: int
) -> None:
    publishers_lose_nothing(new_draft, tmp_path, data, writers)


def publishers_lose_nothing(new_draft: Callable[..., Draft], tmp_path: Path, data: st.DataObject, writers: int) -> None:
    shared, registry = fresh(new_draft())
    drafts = [new_draft() for _ in range(writers)]

    def publisher(draft: Draft) -> Callable[[ObjectRegistry], Record]:
        return lambda own: own.publish(draft, name=NAME, author="ana")

    outcomes = interleave(shared, [publisher(draft) for draft in drafts], data)
    versions = registry.versions(NAME)
    numbers = [version.record.version for version in versions]
    assert numbers == list(range(len(numbers), 0, -1))
    published = [outcome for outcome in outcomes if isinstance(outcome, Record)]
    by_number = {version.record.version: version.record for version in versions}
    assert all(by_number[record.version].publish_id == record.publish_id for record in published)
    assert len({record.version for record in published}) == len(published)
    killed = sum(map(was_killed, outcomes))
    assert len(published) + killed == writers
    assert len(published) <= len(numbers) - 2 <= len(published) + killed
    for version in versions:  # whoever was killed: what is visible is whole
        for file in version.record.manifest.files:
            target = tmp_path / "fetched"
            registry.fetch_file(version.record, file.path, target)
            target.unlink()
        assert registry.resolve(NAME.at(version.record.digest)).record.digest == version.record.digest


@ORDERS
@given(data=st.data(), versions=st.lists(st.sampled_from([1, 2]), min_size=2, max_size=4), force=st.booleans())
def test_channel_moves_are_never_lost_and_movers_know(
    new_draft: Callable[..., Draft], data: st.DataObject, versions: list[int], force: bool
) -> None:
    movers_know(new_draft, data, versions, force)


@pytest.mark.slow
@MANY_ORDERS
@given(data=st.data(), versions=st.lists(st.sampled_from([1, 2]), min_size=2, max_size=4), force=st.booleans())
def test_channel_moves_in_many_orders(
    new_draft: Callable[..., Draft], data: st.DataObject, versions: list[int], force: bool
) -> None:
    movers_know(new_draft, data, versions, force)


def movers_know(new_draft: Callable[..., Draft], data: st.DataObject, versions: list[int], force: bool) -> None:
    shared, registry = fresh(new_draft())

    def mover(number: int, version: int) -> Callable[[ObjectRegistry], ChannelMove]:
        return lambda own: own.set_channel(NAME, "prod", {version: 100}, who=str(number), force=force)

    outcomes = interleave(shared, [mover(i, version) for i, version in enumerate(versions)], data)
    log = registry.channel_log(NAME, "prod") if registry.channels(NAME) else []
    assert [move.seq for move in log] == list(range(len(log), 0, -1))
    moved = [outcome for outcome in outcomes if isinstance(outcome, ChannelMove)]
    assert {move.op for move in moved} <= {move.op for move in log}
    assert all(move in log for move in moved)
    told_no = {str(i) for i, outcome in enumerate(outcomes) if isinstance(outcome, Conflict)}
    assert not told_no & {move.who for move in log}
    assert not (force and told_no)
    assert len(log) <= len(moved) + sum(map(was_killed, outcomes))
