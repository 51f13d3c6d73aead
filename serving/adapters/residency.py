"""Which adapters the engine holds, who is using them, and which is forgotten when the next one needs the room.

`Places` is the rule book: names, leases, order of use; no I/O, no clock. `Residency` carries it out on an `Engine`:

    async with residency.lease(record):      # loads it first where it is not resident
        ...                                  # from here to the last byte it cannot be forgotten

Why not leave it to vLLM: its own LRU evicts what is in use, reads an evicted adapter from disk again in the middle of
a step, and ends the whole server where the folder is gone by then. So it is never let to come to that: an adapter
is forgotten here before ``max_cpu_loras`` would be exceeded.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections import OrderedDict
from collections.abc import AsyncIterator, Awaitable, Callable
from functools import partial
from pathlib import Path
from typing import Protocol

from adapterhub.errors import AdapterError, Conflict, IntegrityError, StillLoading, TooManyRequests
from adapterhub.manifest import Record

# Between an answer's last byte and the end of its lease. The engine hears of a request that was broken off, or that
# ended on a stop string, by a message of its own, a moment after the client's side is over.
SETTLE_SECONDS = 0.25
REFUSAL_SECONDS = 60.0  # that an adapter which the engine refused is not tried again: a load holds up the others'
# Loads that the engine is asked for together: it does them between two steps. One by one, each would wait for a step
# of its own; all of a crowd, everybody's answers would stand still for the sum of them.
AT_ONCE = 4
RETRY_SECONDS = 5.0  # until a client that was sent away should ask again


class Engine(Protocol):
    """What residency needs of the engine."""

    async def load(self, name: str, path: Path) -> None:
        """Make the adapter in a folder ready to use: in the engine's memory and in a slot. Raises AdapterHubError."""

    async def forget(self, name: str) -> None:
        """Free it. Nobody uses it."""

    async def beat(self) -> None:
        """Returns once it has finished the step that it is in. Raises EngineError where it ended."""

    @property
    def is_dead(self) -> bool:
        """Whether it ended, and answers nothing any more."""


class Witness(Protocol):
    """Who is told what came and went."""

    def loaded(self, record: Record, seconds: float) -> None:
        """A version is in the engine, and it took so long."""

    def refused(self) -> None:
        """The engine did not take one."""

    def forgot(self, name: str, *, swapped: bool) -> None:
        """A version is gone. ``swapped``: another needed its room."""


class Places:
    """Leases on named adapters, at most ``capacity`` of them resident.

    A lease may be taken before the adapter is resident: whoever waits for a load holds on to what is loaded.
    """

    def __init__(self, capacity: int) -> None:
        self.capacity = capacity
        self._resident: OrderedDict[str, None] = OrderedDict()  # least recently used first
        self._leases: dict[str, int] = {}
        self._pins: set[str] = set()
        self._expected: set[str] = set()  # being loaded: their places are taken already

    def take(self, name: str) -> None:
        self._leases[name] = self._leases.get(name, 0) + 1
        if name in self._resident:
            self._resident.move_to_end(name)

    def give_back(self, name: str) -> None:
        left = self._leases.pop(name) - 1
        if left:
            self._leases[name] = left

    def leases(self, name: str) -> int:
        return self._leases.get(name, 0)

    def is_resident(self, name: str) -> bool:
        return name in self._resident

    @property
    def resident(self) -> tuple[str, ...]:
        """Least recently used first."""
        return tuple(self._resident)

    def expect(self, name: str) -> None:
        """Keep a place for an adapter that is going to be loaded, until `add` or `give_up`."""
        assert not self.is_full, "no place is free"
        self._expected.add(name)

    def give_up(self, name: str) -> None:
        """Leave a kept place to others, unless it was filled."""
        self._expected.discard(name)

    def add(self, name: str) -> None:
        """It is loaded, in the place that was kept for it."""
        self._expected.remove(name)
        self._resident[name] = None

    def drop(self, name: str) -> None:
        del self._resident[name]

    @property
    def is_full(self) -> bool:
        return len(self._resident) + len(self._expected) >= self.capacity

    def idle(self) -> str | None:
        """The least recently used adapter without a lease or a pin."""
        return next((name for name in self._resident if self.is_idle(name)), None)

    def is_idle(self, name: str) -> bool:
        return name not in self._leases and name not in self._pins

    def pin(self, name: str) -> None:
        """Keep it from now on, resident or not yet; all but one place may be pinned. Raises Conflict."""
        if len(self._pins | {name}) >= self.capacity:
            raise Conflict(f"{name} cannot be pinned", why=f"{len(self._pins)} of {self.capacity} places are")
        self._pins.add(name)

    def unpin(self, name: str) -> None:
        self._pins.discard(name)

    @property
    def pins(self) -> tuple[str, ...]:
        return tuple(sorted(self._pins))

    def is_pinned(self, name: str) -> bool:
        return name in self._pins


class Residency:
    """Adapters in the engine, kept by the rules of `Places`. One event loop; not for threads."""

    def __init__(
        self,
        engine: Engine,
        *,
        capacity: int,
        prepare: Callable[[Record], Awaitable[Path]],
        settle: float = SETTLE_SECONDS,
        clock: Callable[[], float] = time.monotonic,
        witness: Witness | None = None,
    ) -> None:
        """``prepare`` gives a version's folder, and is quick where it is there already; ``settle`` in seconds."""
        self._witness = witness
        self._clock = clock
        self._refused: dict[str, tuple[float, AdapterError]] = {}  # by the engine: until when
        self.places = Places(capacity)
        self._engine = engine
        self._prepare = prepare
        self._settle = settle
        self._loads: dict[str, asyncio.Task[None]] = {}
        self._digests: dict[str, str] = {}  # of every name that was ever loaded: a version never changes
        self._room = asyncio.Lock()  # one at a time looks for room: each needs what the one before left
        self._loading = asyncio.Semaphore(AT_ONCE)
        self._idle = asyncio.Event()  # a lease or a load ended: there may be room

    @property
    def digests(self) -> frozenset[str]:
        """Of what is loaded, being loaded, or waited for."""
        return frozenset(self._digests[name] for name in (*self.places.resident, *self._loads))

    @contextlib.asynccontextmanager
    async def lease(self, record: Record) -> AsyncIterator[None]:
        """Hold a version resident. Raises AdapterHubError where it cannot be."""
        let_go = await self.hold(record)
        try:
            yield
        finally:
            let_go()

    async def hold(self, record: Record) -> Callable[[], object]:
        """A lease, and the way to end it. Raises AdapterHubError where a version cannot be resident."""
        name = str(record.ref)
        self.places.take(name)
        try:
            await self.ensure(record)
        except BaseException:  # a cancelled wait too gives its lease back
            self._give_back(name)
            raise
        return partial(asyncio.get_running_loop().call_later, self._settle, self._give_back, name)

    async def ensure(self, record: Record, *, within: float | None = None) -> None:
        """Load a version unless it is resident. Callers share one load, and none that leaves cancels it.

        Raises StillLoading after ``within`` seconds; the load goes on.
        """
        name = str(record.ref)
        if self._digests.setdefault(name, record.digest) != record.digest:
            raise IntegrityError(
                f"{name} names other bytes than before",
                why="the registry was replaced under a running server",
                hint="start the server again",
            )
        if self.places.is_resident(name):
            return
        self._check_refusal(name)
        task = self._loads.get(name)
        if task is None:
            task = self._loads[name] = asyncio.create_task(self._load(record), name=f"load {name}")
            task.add_done_callback(lambda t: self._loaded(name, t))
        done, _ = await asyncio.wait({task}, timeout=within)
        if not done:
            raise StillLoading(f"{name} is being loaded", why="ask again in a moment", retry_after=RETRY_SECONDS)
        await task

    def _check_refusal(self, name: str) -> None:
        until, error = self._refused.get(name, (0.0, None))
        if error is None:
            return
        if self._clock() < until:
            raise error.with_traceback(None)
        del self._refused[name]

    async def make_room(self, record: Record, *, most: int) -> None:
        """Forget idle versions of a version's tenant, so that with it at most ``most`` of them are loaded.

        Raises TooManyRequests where all are in use.
        """
        name, own = str(record.ref), f"{record.name.tenant}/"
        async with self._room:
            while not self.places.is_resident(name) and name not in self._loads:
                loaded = [other for other in self.places.resident if other.startswith(own)]
                loading = [other for other in self._loads if other.startswith(own)]
                if len(loaded) + len(loading) < most:
                    return
                idle = next((other for other in loaded if self.places.is_idle(other)), None)
                if idle is None:
                    raise TooManyRequests(
                        f"{record.name.tenant} has too many adapters in use", why=f"at most {most} are loaded at once"
                    )
                await self._forget(idle, swapped=True)

    async def forget(self, name: str) -> bool:
        """Free a version; False where it is in use or pinned."""
        async with self._room:
            if not self.places.is_resident(name) or not self.places.is_idle(name):
                return False
            await self._forget(name, swapped=False)
            return True

    async def _forget(self, name: str, *, swapped: bool) -> None:
        self.places.drop(name)
        await self._engine.forget(name)
        if self._witness is not None:
            self._witness.forgot(name, swapped=swapped)

    def _loaded(self, name: str, task: asyncio.Task[None]) -> None:
        del self._loads[name]
        if not task.cancelled():
            task.exception()  # seen: with every waiter gone nobody else would look

    async def _load(self, record: Record) -> None:
        name, begun = str(record.ref), self._clock()
        await self._prepare(record)
        async with self._room:
            while self.places.is_full:
                await self._make_room()
            self.places.expect(name)
        try:
            async with self._loading:
                await self._bring_in(record)
            self.places.add(name)
        finally:  # also of one that is cancelled
            self.places.give_up(name)
            self._idle.set()
        if self._witness is not None:
            self._witness.loaded(record, self._clock() - begun)

    async def _bring_in(self, record: Record) -> None:
        name = str(record.ref)
        path = await self._prepare(record)  # again: the folder may have been deleted while we waited for room
        try:
            await self._engine.load(name, path)
        except AdapterError as error:
            self._refused[name] = (self._clock() + REFUSAL_SECONDS, error)
            if self._witness is not None:
                self._witness.refused()
            raise

    async def _make_room(self) -> None:
        idle = self.places.idle()
        if idle is None:
            self._idle.clear()
            await self._idle.wait()
        else:
            await self._forget(idle, swapped=True)

    def _give_back(self, name: str) -> None:
        self.places.give_back(name)
        self._idle.set()
