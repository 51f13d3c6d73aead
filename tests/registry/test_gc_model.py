"""Collectors and publishers in every order of their steps, exhaustively: no visible version ever lacks a byte.

The real code runs, each process in a thread of its own, and moves only when the explorer says so, by one operation on
what the handshake is made of. A state is what the store holds and what each process has seen; each is visited once.
That a process was killed is a state from which it never moves again, so it is among them; so is a publisher that is
paused while everybody else goes on, and, where ``publish=-1``, for longer than any collector waits.

Each step of the handshake is needed: `MUTATIONS` take one out, and the explorer finds the version that is broken by it.
"""

from __future__ import annotations

import hashlib
import re
import threading
import uuid
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from functools import lru_cache
from random import Random
from typing import Any, BinaryIO

import pytest

from adapterhub.errors import AlreadyExists
from adapterhub.manifest import FileEntry, Record
from adapterhub.refs import AdapterName
from adapterhub.registry import Draft, ObjectRegistry, layout
from adapterhub.registry.lifecycle.gc import Patience, collect
from adapterhub.registry.memory import MemoryStore
from adapterhub.registry.records import blob_key
from adapterhub.registry.store import Entry

NAME, OTHER = AdapterName("acme", "support"), AdapterName("acme", "other")
PATIENCE = 20  # seconds: a process that does not come back is a bug of the test
FOREVER = 10.0**9
INTENTS, CONDEMNED, BLOBS = layout.intents("acme"), layout.collections("acme"), layout.blobs("acme")

Work = Callable[[ObjectRegistry], Any]
Garbage = tuple[Draft, Callable[[], "Shared"]]


class Over(BaseException):
    """The run is over for this process; nothing that it could catch."""


class Shared(MemoryStore):
    """The store, and what it was told to delete."""

    def __init__(self) -> None:
        super().__init__()
        self.sent: list[str] = []


class Process(MemoryStore):
    """The shared store as one process sees it: what belongs to the handshake waits for its turn.

    What does not wait goes with the step before it: reads of what never changes, and what only its own writer looks at.
    """

    def __init__(self, name: str, shared: Shared, work: Work) -> None:
        super().__init__()
        self._shared = shared
        self._turn, self._paused = threading.Lock(), threading.Lock()  # handed over: cheaper than semaphores
        self._turn.acquire()
        self._paused.acquire()
        self._over = False
        self.seen: list[object] = []
        self.alive = True
        self.outcome: Any = None
        self._thread = threading.Thread(target=self._run, args=(work,), name=name)
        self._thread.start()
        self._wait()

    def _run(self, work: Work) -> None:
        try:
            self.outcome = work(ObjectRegistry(self, wait=lambda _: None))
        except Over:
            pass
        finally:
            self.alive = False
            self._paused.release()

    def go(self) -> None:
        """In the explorer: let it do one step, and wait until it wants the next."""
        self._turn.release()
        self._wait()

    def end(self) -> None:
        self._over = True
        self._turn.release()
        self._thread.join(PATIENCE)

    def _wait(self) -> None:
        assert self._paused.acquire(timeout=PATIENCE)

    def _step(self) -> None:
        if not self._over:
            self._paused.release()
            assert self._turn.acquire(timeout=PATIENCE)
        if self._over:
            raise Over

    def _saw(self, *what: object) -> None:
        self.seen.append(plain(repr(what)))

    def create(self, key: str, value: bytes, *, lasting: bool = True) -> None:
        if is_record(key) or (key.startswith((INTENTS, CONDEMNED)) and not key.endswith(".closed")):
            self._step()
        try:
            self._shared.create(key, value)
        except AlreadyExists:
            self._saw("taken", key)
            raise

    def create_file(self, key: str, source: BinaryIO, *, size: int, sha256: str) -> None:
        self._step()
        self._saw(key, self._shared.exists(key))
        self._shared.create_file(key, source, size=size, sha256=sha256)

    def read(self, key: str) -> bytes:
        if key.startswith((INTENTS, CONDEMNED)):
            self._saw(key, self._shared._values.get(key) if key.endswith(".sealed") else self._shared.exists(key))
        return self._shared.read(key)

    def exists(self, key: str) -> bool:
        self._saw(key, self._shared.exists(key))
        return self._shared.exists(key)

    def keys(self, prefix: str, *, after: str = "", limit: int | None = None) -> list[str]:
        if prefix.startswith(CONDEMNED) or (prefix.endswith("/v/") and limit != 1):
            self._step()
        found = self._shared.keys(prefix, after=after, limit=limit)
        self._saw(prefix, found)
        return found

    def entries(self, prefix: str) -> Iterator[Entry]:
        if prefix != CONDEMNED:
            self._step()
        found = list(self._shared.entries(prefix))
        self._saw(prefix, [entry.key for entry in found])
        yield from found

    def folders(self, prefix: str) -> list[str]:
        return self._shared.folders(prefix)

    def delete(self, *keys: str) -> None:
        if not keys[0].endswith(".sealed"):  # goes with its intent
            self._step()
        self._saw("deleted", keys)
        self._shared.sent += [key for key in keys if key.startswith(BLOBS)]
        self._shared.delete(*keys)

    def deliver_again(self) -> None:
        self._step()
        self._shared.delete(*self._shared.sent)


def is_record(key: str) -> bool:
    return "/v/" in key


def plain(text: str) -> str:
    """Without the times that differ from run to run."""
    return re.sub(r"[0-9]{13}-", "", text)


@dataclass
class Explorer:
    """Visits every state that the processes can bring the store into."""

    start: Callable[[], Shared]
    processes: Callable[[Shared], list[Process]]
    check: Callable[[MemoryStore, list[Process]], None]
    visited: set[object] = field(default_factory=set)

    def run(self) -> int:
        """The number of states. Raises what `check` raises."""
        todo: list[tuple[int, ...]] = [()]
        while todo:
            self._follow(todo.pop(), todo)
        return len(self.visited)

    def walk(self, times: int) -> None:
        """So many runs in random orders, for what has too many states. Raises what `check` raises."""
        for seed in range(times):
            random = Random(seed)
            shared = self.start()
            processes = self.processes(shared)
            try:
                while able := [process for process in processes if process.alive]:
                    random.choice(able).go()
                    self.check(shared, processes)
            finally:
                for process in processes:
                    process.end()

    def _follow(self, schedule: tuple[int, ...], todo: list[tuple[int, ...]]) -> None:
        """One run: as scheduled, then on into states that are new; what else was possible is left to do."""
        shared = self.start()
        processes = self.processes(shared)
        try:
            for number in schedule:
                processes[number].go()
            while self._is_new(shared, processes):
                self.check(shared, processes)
                able = [number for number, process in enumerate(processes) if process.alive]
                if not able:
                    return
                todo += [(*schedule, number) for number in able[1:]]
                schedule = (*schedule, able[0])
                processes[able[0]].go()
        finally:
            for process in processes:
                process.end()

    def _is_new(self, shared: Shared, processes: list[Process]) -> bool:
        held = frozenset(plain(key) for key in shared._values if "/log/" not in key)
        state = held, tuple((process.alive, tuple(process.seen), process.outcome is None) for process in processes)
        known = state in self.visited
        self.visited.add(state)
        return not known


record_of = lru_cache(maxsize=64)(Record.from_bytes)  # a record is looked at after each step, and never changes


def versions_are_whole(shared: Shared, processes: list[Process]) -> None:
    for key in [key for key in shared._values if is_record(key)]:
        record = record_of(shared._values[key])
        if shared.keys(layout.status_changes(record.name, record.version)):
            continue  # deleted
        for file in record.manifest.files:
            assert shared.exists(blob_key(record, file.sha256)), f"{record.ref} lost its bytes"
    for process in processes:
        if isinstance(process.outcome, BaseException):
            raise process.outcome


@pytest.fixture
def same_ids(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each process names things in the same way in every run."""

    def named() -> uuid.UUID:
        thread = threading.current_thread()
        number = getattr(thread, "ids", 0) + 1
        thread.ids = number  # type: ignore[attr-defined]
        return uuid.uuid5(uuid.NAMESPACE_OID, f"{thread.name} {number}")

    monkeypatch.setattr("uuid.uuid4", named)


@pytest.fixture
def garbage(new_draft: Callable[..., Draft]) -> Garbage:
    """A draft of one file, and stores where its bytes belong to a version that was deleted."""
    whole = new_draft("the bytes")
    manifest = replace(whole.manifest, files=whole.manifest.files[-1:])
    draft = replace(whole, manifest=manifest)
    first = MemoryStore()
    registry = ObjectRegistry(first)
    registry.publish(draft, name=NAME, author="ana")
    registry.set_status(NAME, 1, "deleted", who="ana")

    def start() -> Shared:
        copy = Shared()
        copy._values, copy._modified = dict(first._values), dict(first._modified)
        return copy

    return draft, start


def publisher(draft: Draft, name: AdapterName = NAME) -> Work:
    return lambda registry: registry.publish(draft, name=name, author="ben")


def collector(*, publish: float, closed: float = FOREVER, times: int = 1) -> Work:
    def work(registry: ObjectRegistry) -> int:
        patience = Patience(young=-1, publish=publish, closed=closed)
        return sum(collect(registry, ["acme"], patience=patience).freed for _ in range(times))

    return work


def network(registry: ObjectRegistry) -> None:
    """What a collector deleted is deleted once more, later: a request that had been taken for lost."""
    assert isinstance(registry.store, Process)
    registry.store.deliver_again()


@dataclass(frozen=True)
class Scenario:
    """Processes by name, and what they do."""

    works: Callable[[Draft], dict[str, Work]]
    kinds: dict[str, type[Process]] = field(default_factory=dict)  # by name; those whose handshake lacks a step

    @property
    def name(self) -> str:
        return next((kind.__name__ for kind in self.kinds.values() if kind not in SLOW.values()), "reuse")

    def explorer(self, draft: Draft, start: Callable[[], Shared]) -> Explorer:
        works = self.works(draft)

        def processes(shared: Shared) -> list[Process]:
            return [self.kinds.get(name, Process)(name, shared, work) for name, work in works.items()]

        return Explorer(start, processes, versions_are_whole)


def one(*, publish: float, closed: float = FOREVER, late: bool = False) -> Callable[[Draft], dict[str, Work]]:
    """A publisher who needs what a collector is about to delete."""

    def works(draft: Draft) -> dict[str, Work]:
        both = {"publisher": publisher(draft), "collector": collector(publish=publish, closed=closed)}
        return both | ({"network": network} if late else {})

    return works


@pytest.mark.parametrize("publish", [FOREVER, -1], ids=["waited for", "given up"])
def test_no_version_loses_a_byte(garbage: Garbage, same_ids: None, publish: float) -> None:
    assert Scenario(one(publish=publish)).explorer(*garbage).run() > 100


@pytest.mark.slow
@pytest.mark.parametrize("publish", [FOREVER, -1], ids=["waited for", "given up"])
def test_a_delete_may_come_late(garbage: Garbage, same_ids: None, publish: float) -> None:
    assert Scenario(one(publish=publish, late=True)).explorer(*garbage).run() > 200


@pytest.mark.parametrize("publish", [FOREVER, -1], ids=["waited for", "given up"])
def test_many_publishers_and_collectors(garbage: Garbage, same_ids: None, publish: float) -> None:
    def works(draft: Draft) -> dict[str, Work]:
        publishers = {f"publisher {n}": publisher(draft, name) for n, name in enumerate((NAME, NAME, OTHER))}
        return publishers | {f"collector {n}": collector(publish=publish, closed=-1, times=2) for n in range(2)}

    Scenario(works).explorer(*garbage).walk(60)


def test_when_all_is_quiet_nothing_is_left(garbage: Garbage) -> None:
    draft, start = garbage
    registry = ObjectRegistry(start())
    assert registry.publish(draft, name=OTHER, author="ana").version == 1
    work = collector(publish=-1, closed=-1)
    assert work(registry) == 0
    registry.set_status(OTHER, 1, "deleted", who="ana")
    assert work(registry) == len(draft.manifest.files)
    for prefix in (BLOBS, INTENTS, CONDEMNED):
        assert registry.store.keys(prefix) == []


# ── a publish that sealed, and never said how it ended ────────────────────────────────────────────────────────────


class Coarse(Process):
    """Pauses only where this scenario is about something: the rest of the handshake is explored above."""

    def _step(self) -> None:
        if self._over:
            raise Over

    def pause(self) -> None:
        super()._step()


class Sleeper(Coarse):
    """A publisher that is paused once it sealed: before it looks for the newest version and for doubts, and tries."""

    sealed = ""  # the key

    def create(self, key: str, value: bytes, *, lasting: bool = True) -> None:
        if is_record(key):
            self.pause()
        super().create(key, value, lasting=lasting)
        self.sealed = key if key.endswith(".sealed") else self.sealed

    def keys(self, prefix: str, *, after: str = "", limit: int | None = None) -> list[str]:
        if prefix.endswith("/v/") and self.sealed:
            self.pause()
        return super().keys(prefix, after=after, limit=limit)

    def exists(self, key: str) -> bool:
        if key.startswith(INTENTS):
            self.pause()
        return super().exists(key)

    def delete(self, *keys: str) -> None:
        self.pause()  # it committed: what it did is looked at before it looks itself
        super().delete(*keys)


class Doubter(Coarse):
    """A collector that is paused before it begins, before it doubts, and before it looks at the newest version."""

    def entries(self, prefix: str) -> Iterator[Entry]:
        if prefix == BLOBS:
            self.pause()
        return super().entries(prefix)

    def create(self, key: str, value: bytes, *, lasting: bool = True) -> None:
        if key.endswith(".doubted"):
            self.pause()
        super().create(key, value, lasting=lasting)

    def keys(self, prefix: str, *, after: str = "", limit: int | None = None) -> list[str]:
        if prefix.endswith("/v/") and limit == 1:
            self.pause()
        return super().keys(prefix, after=after, limit=limit)


def sealed_long_ago(draft: Draft) -> dict[str, Work]:
    """A publisher that sleeps, a version by somebody else, and a collector that waits for nobody."""
    path = draft.manifest.files[0].path

    def others(registry: ObjectRegistry) -> None:
        assert isinstance(registry.store, Coarse)
        file = FileEntry(path, 5, hashlib.sha256(b"other").hexdigest())
        other = replace(draft, manifest=replace(draft.manifest, files=(file,)), replaced={path: b"other"})
        registry.store.pause()
        registry.publish(other, name=NAME, author="eve")

    return {"publisher": publisher(draft), "others": others, "collector": collector(publish=-1, closed=-1, times=2)}


SLOW = {"publisher": Sleeper, "others": Coarse, "collector": Doubter}
DOUBTED = Scenario(sealed_long_ago, SLOW)


def test_a_publish_that_sealed_long_ago_may_still_wake_up(garbage: Garbage, same_ids: None) -> None:
    DOUBTED.explorer(*garbage).walk(30)


@pytest.mark.slow
def test_a_publish_that_sealed_long_ago_may_wake_up_at_any_time(garbage: Garbage, same_ids: None) -> None:
    assert DOUBTED.explorer(*garbage).run() > 200


# ── each step is needed ──────────────────────────────────────────────────────────────────────────────────────────


class TellsNobody(Process):
    """Publishes without an intent."""

    def create(self, key: str, value: bytes, *, lasting: bool = True) -> None:
        if not (key.startswith(INTENTS) and key.endswith(".json")):
            super().create(key, value, lasting=lasting)


class LooksFirst(Process):
    """Looks at what is condemned, and tells its intent after that."""

    held: tuple[str, bytes] | None = None

    def create(self, key: str, value: bytes, *, lasting: bool = True) -> None:
        if key.startswith(INTENTS) and key.endswith(".json"):
            self.held = key, value
        else:
            super().create(key, value, lasting=lasting)

    def keys(self, prefix: str, *, after: str = "", limit: int | None = None) -> list[str]:
        found = super().keys(prefix, after=after, limit=limit)
        if prefix == CONDEMNED and self.held:
            super().create(*self.held)
        return found


class LooksAtNothing(Process):
    """Does not ask what is condemned."""

    def keys(self, prefix: str, *, after: str = "", limit: int | None = None) -> list[str]:
        return [] if prefix == CONDEMNED else super().keys(prefix, after=after, limit=limit)


class NeverSeals(Process):
    """Publishes without asking whether it was given up."""

    def create(self, key: str, value: bytes, *, lasting: bool = True) -> None:
        if not key.endswith(".sealed"):
            super().create(key, value, lasting=lasting)


class CondemnsNothing(Process):
    """Collects without a word."""

    def create(self, key: str, value: bytes, *, lasting: bool = True) -> None:
        if not key.startswith(CONDEMNED):
            super().create(key, value, lasting=lasting)


class IgnoresPublishes(Process):
    """Collects what a publish under way will name."""

    def entries(self, prefix: str) -> Iterator[Entry]:
        return iter(()) if prefix == INTENTS else super().entries(prefix)


class AsksPublishesFirst(Process):
    """Condemns after it looked for publishes under way."""

    early: list[Entry] | None = None

    def create(self, key: str, value: bytes, *, lasting: bool = True) -> None:
        if key.startswith(CONDEMNED) and key.endswith(".json"):
            self.early = list(super().entries(INTENTS))
        super().create(key, value, lasting=lasting)

    def entries(self, prefix: str) -> Iterator[Entry]:
        return iter(self.early) if prefix == INTENTS and self.early is not None else super().entries(prefix)


class ReadsRecordsFirst(Process):
    """Reads the versions before the publishes under way, and not again."""

    condemned = False
    early: list[str] | None = None

    def create(self, key: str, value: bytes, *, lasting: bool = True) -> None:
        super().create(key, value, lasting=lasting)
        self.condemned = self.condemned or key.startswith(CONDEMNED)

    def entries(self, prefix: str) -> Iterator[Entry]:
        if prefix == INTENTS and self.condemned:
            self.early = super().keys(layout.versions(NAME))
        return super().entries(prefix)

    def keys(self, prefix: str, *, after: str = "", limit: int | None = None) -> list[str]:
        if self.early is not None and prefix == layout.versions(NAME):
            return [key for key in self.early if key > after]
        return super().keys(prefix, after=after, limit=limit)


class ReadsRecordsOnce(Process):
    """Does not read again what was published since it began."""

    early: list[str] | None = None

    def keys(self, prefix: str, *, after: str = "", limit: int | None = None) -> list[str]:
        if prefix != layout.versions(NAME):
            return super().keys(prefix, after=after, limit=limit)
        if self.early is None:
            self.early = super().keys(prefix)
        return [key for key in self.early if key > after]


class DoesNotAsk(Process):
    """Takes a publish for given up, whatever its publisher says."""

    def create(self, key: str, value: bytes, *, lasting: bool = True) -> None:
        try:
            super().create(key, value, lasting=lasting)
        except AlreadyExists:
            if not key.endswith(".sealed"):
                raise

    def read(self, key: str) -> bytes:
        return b"given up" if key.endswith(".sealed") else super().read(key)


class NeverDoubts(Sleeper):
    """Does not look whether it is doubted."""

    def exists(self, key: str) -> bool:
        return not key.startswith(INTENTS) and super().exists(key)


class AsksBeforeItLooks(Sleeper):
    """Asks whether it is doubted before it looks at the newest version, not after."""

    doubted = False

    def keys(self, prefix: str, *, after: str = "", limit: int | None = None) -> list[str]:
        if prefix.endswith("/v/") and self.sealed:
            self.pause()
            self.doubted = self._shared.exists(self.sealed.replace(".sealed", ".doubted"))
            self._saw("doubted", self.doubted)
        return super().keys(prefix, after=after, limit=limit)

    def exists(self, key: str) -> bool:
        return self.doubted if key.startswith(INTENTS) else super().exists(key)


class LooksBeforeItDoubts(Doubter):
    """Takes the newest version from before the doubt."""

    early: list[str] | None = None

    def entries(self, prefix: str) -> Iterator[Entry]:
        if self.early is None:
            self.early = self._shared.keys(layout.versions(NAME), limit=1)
            self._saw("early", self.early)
        return super().entries(prefix)

    def keys(self, prefix: str, *, after: str = "", limit: int | None = None) -> list[str]:
        if limit == 1 and prefix == layout.versions(NAME) and self.early is not None:
            return self.early
        return super().keys(prefix, after=after, limit=limit)


class DoubtsAndForgets(Doubter):
    """Does not wait until the number is taken."""

    def read(self, key: str) -> bytes:
        return b"0" if key.endswith(".past") else super().read(key)


WAITED, GIVEN_UP = one(publish=FOREVER), one(publish=-1)
MUTATIONS = [
    Scenario(WAITED, {"publisher": TellsNobody}),
    Scenario(WAITED, {"publisher": LooksFirst}),
    Scenario(WAITED, {"publisher": LooksAtNothing}),
    Scenario(GIVEN_UP, {"publisher": NeverSeals}),
    Scenario(WAITED, {"collector": CondemnsNothing}),
    Scenario(WAITED, {"collector": IgnoresPublishes}),
    Scenario(WAITED, {"collector": AsksPublishesFirst}),
    Scenario(WAITED, {"collector": ReadsRecordsFirst}),
    Scenario(WAITED, {"collector": ReadsRecordsOnce}),
    Scenario(GIVEN_UP, {"collector": DoesNotAsk}),
    Scenario(sealed_long_ago, SLOW | {"publisher": NeverDoubts}),
    Scenario(sealed_long_ago, SLOW | {"publisher": AsksBeforeItLooks}),
    Scenario(sealed_long_ago, SLOW | {"collector": LooksBeforeItDoubts}),
    Scenario(sealed_long_ago, SLOW | {"collector": DoubtsAndForgets}),
    Scenario(one(publish=FOREVER, closed=-1, late=True)),  # a condemned key is written again
]


@pytest.mark.slow
@pytest.mark.parametrize("mutation", MUTATIONS, ids=lambda m: m.name)
def test_without_any_one_step_bytes_are_lost(garbage: Garbage, same_ids: None, mutation: Scenario) -> None:
    with pytest.raises(AssertionError, match="lost its bytes"):
        mutation.explorer(*garbage).run()
