"""Which version each reference means on this replica, and how that changes while requests are under way.

A reference that was asked for once is watched from then on. When its channel moves, the new version is fetched and
loaded first, and only then does the name flip: requests under way finish on the old version, the next one starts on
the new, and none waits for a load.

    asked for the first time  ──►  whatever the registry says; its first request loads it
    channel moved             ──►  warm the new version, then flip; of a channel that several share, all of them
    version yanked            ──►  refused at once (410); a channel that was moved off it flips at once
    registry away             ──►  what is known goes on being served
    not there                 ──►  not looked up again before the next poll

The change log is polled every few seconds, one LIST a tenant; a full look behind it finds what the log lost.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Awaitable, Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

from adapterhub.errors import AdapterHubError, Gone, IntegrityError, NotFound, StorageError
from adapterhub.manifest import Record
from adapterhub.refs import AdapterRef
from adapterhub.registry.base import Registry, Version
from adapterhub.serving.rollout.canary import pick
from adapterhub.serving.rollout.deployment import Deployment, read_deployment
from adapterhub.serving.rollout.events import Event, event_of

log = logging.getLogger(__name__)

_MOST_UNKNOWN = 10_000  # references that are remembered not to be there; more are looked up each time

Blocking = Callable[..., Awaitable[Any]]  # runs a blocking function, with its arguments, off the event loop


async def _approved(ref: AdapterRef, deployment: Deployment) -> None:
    """Whatever is loaded."""


@dataclass
class Pointer:
    """One reference as this replica knows it."""

    ref: AdapterRef
    ready: Deployment  # what requests get
    wanted: Deployment  # what the registry says
    refusal: AdapterHubError | None = None  # the registry refuses the reference now
    problem: str = ""  # why `wanted` is not ready
    move: asyncio.Task[None] | None = field(default=None, repr=False)

    @property
    def is_settled(self) -> bool:
        return self.ready.is_as(self.wanted)


class Rollout:
    """The references in use on this replica. One event loop; not for threads."""

    def __init__(
        self,
        registry: Registry,
        *,
        warm: Callable[[Record], Awaitable[None]],
        blocking: Blocking,
        approve: Callable[[AdapterRef, Deployment], Awaitable[None]] = _approved,
        tell: Callable[[Event], None] = lambda event: None,
    ) -> None:
        """``warm`` makes a version ready to answer at once. ``approve`` raises AdapterHubError where what is warm
        should not get callers all the same. ``tell`` hears what happened, and returns at once.
        """
        self._registry = registry
        self._warm = warm
        self._blocking = blocking
        self._approve = approve
        self._tell = tell
        self._pointers: dict[AdapterRef, Pointer] = {}
        self._learning: dict[AdapterRef, asyncio.Task[Deployment]] = {}
        self._unknown: dict[AdapterRef, NotFound] = {}  # until the next look
        self._cursors: dict[str, str] = {}  # by tenant
        self._one_look = asyncio.Lock()
        self._away = False

    @property
    def is_away(self) -> bool:
        """Whether the last look at the registry failed."""
        return self._away

    @property
    def pointers(self) -> tuple[Pointer, ...]:
        return tuple(self._pointers.values())

    async def current(self, ref: AdapterRef, caller: str = "") -> Version:
        """What ``ref`` means to ``caller`` here and now. Raises NotFound, Gone, StorageError."""
        return pick((await self.deployment(ref)).shares, ref=ref, caller=caller)

    async def deployment(self, ref: AdapterRef) -> Deployment:
        """What ``ref`` means here and now, to all callers together. Raises NotFound, Gone, StorageError."""
        if ref in self._unknown:
            raise self._unknown[ref].with_traceback(None)
        pointer = self._pointers.get(ref)
        if pointer is None:
            return await self._learn(ref)
        if pointer.refusal is not None:
            raise pointer.refusal.with_traceback(None)  # the same object each time: do not let it grow
        return pointer.ready

    async def watch(self, *, poll_seconds: float, rescan_seconds: float) -> None:
        """Look at the change logs, and now and then at everything, until cancelled."""
        next_rescan = time.monotonic() + rescan_seconds
        while True:
            await asyncio.sleep(poll_seconds)
            rescan = time.monotonic() >= next_rescan
            try:
                await (self.rescan() if rescan else self.look())
            except AdapterHubError as error:
                if not self._away:
                    log.warning("the registry cannot be read; what is known goes on being served (%s)", error)
                self._away = True
                continue
            if self._away:
                log.warning("the registry can be read again")
            self._away = False
            if rescan:
                next_rescan = time.monotonic() + rescan_seconds

    async def look(self) -> None:
        """Look at what the change logs name."""
        async with self._one_look:
            self._unknown.clear()
            for tenant, cursor in list(self._cursors.items()):
                changes = await self._blocking(self._registry.changes, tenant, cursor)
                await self._refresh(p for p in self.pointers if any(e.concerns(p.ref) for e in changes.events))
                self._cursors[tenant] = changes.cursor

    async def rescan(self) -> None:
        """Look at everything that is in use."""
        async with self._one_look:
            self._unknown.clear()
            await self._refresh(self.pointers)

    async def settle(self) -> None:
        """Wait until every move that was seen has ended, well or not."""
        while moves := [p.move for p in self.pointers if p.move is not None]:
            await asyncio.shield(asyncio.gather(*moves))

    # ── learning and moving ──────────────────────────────────────────────────────────────────────────────────

    async def _learn(self, ref: AdapterRef) -> Deployment:
        """The first request for a reference; others that come meanwhile share the answer."""
        task = self._learning.get(ref)
        if task is None:
            task = self._learning[ref] = asyncio.create_task(self._resolve_first(ref))
            task.add_done_callback(lambda t: self._learned(ref, t))
        return await asyncio.shield(task)

    def _learned(self, ref: AdapterRef, task: asyncio.Task[Deployment]) -> None:
        del self._learning[ref]
        error = None if task.cancelled() else task.exception()  # seen: with every waiter gone nobody else would look
        if isinstance(error, NotFound) and len(self._unknown) < _MOST_UNKNOWN:
            self._unknown[ref] = error

    async def _resolve_first(self, ref: AdapterRef) -> Deployment:
        tenant = ref.name.tenant
        # the cursor before the look: a change in between is seen twice rather than never
        cursor = self._cursors.get(tenant) or (await self._blocking(self._registry.changes, tenant)).cursor
        try:
            found: Deployment = await self._blocking(read_deployment, self._registry, ref)
        except NotFound:
            await self._check_it_is_there()
            raise
        self._cursors.setdefault(tenant, cursor)
        pointer = self._pointers[ref] = Pointer(ref, ready=found.until_scored, wanted=found)
        if not pointer.is_settled:
            pointer.move = asyncio.create_task(self._bring(pointer), name=f"move {ref}")
        return pointer.ready

    async def _check_it_is_there(self) -> None:
        """A folder that is not mounted any more says that nothing is there. Raises StorageError."""
        known = next(iter(self._pointers.values()), None)
        if known is None:
            return
        try:
            await self._blocking(self._registry.resolve, known.ready.main.record.ref)
        except Gone:
            return
        except NotFound as error:
            raise StorageError("the registry is not there any more", why=f"it has lost {known.ready}") from error

    async def _refresh(self, pointers: Iterable[Pointer]) -> None:
        for pointer in list(pointers):
            try:
                found: Deployment = await self._blocking(read_deployment, self._registry, pointer.ref)
            except Gone as error:
                pointer.refusal = error
                continue
            except (NotFound, IntegrityError) as error:
                # A record is never deleted: the registry has lost it, or is another one now (an unmounted folder).
                log.error("%s goes on as it was, the registry cannot tell of it: %s", pointer.ref, error)
                continue
            if found.contradicts(pointer.ready):
                log.error("%s goes on as it was: the registry was replaced, start the server again", pointer.ref)
                continue
            before, pointer.wanted, pointer.refusal = pointer.wanted, found, None
            if pointer.is_settled:
                if before.candidate is not None and not before.is_as(found):  # sent back before it had callers here
                    self._tell(event_of(pointer.ref, before, found))
                pointer.ready, pointer.problem = found, ""  # the same versions, their status perhaps not
            elif not await self._still_good(pointer.ready):
                self._flip(pointer)
            elif pointer.move is None:
                pointer.move = asyncio.create_task(self._bring(pointer), name=f"move {pointer.ref}")

    async def _still_good(self, deployment: Deployment) -> bool:
        for version in deployment.versions:
            try:
                await self._blocking(self._registry.resolve, version.record.ref)
            except Gone:
                return False
            except (NotFound, IntegrityError):  # lost, not withdrawn
                continue
        return True

    async def _bring(self, pointer: Pointer) -> None:
        """Warm what is wanted, flip to it, and again if it moved on meanwhile."""
        try:
            while not pointer.is_settled:
                target = pointer.wanted
                for version in target.versions:
                    coming = version.record.ref
                    await self._warm(version.record)
                await self._approve(pointer.ref, target)
                if not pointer.is_settled and pointer.wanted.is_as(target):
                    self._flip(pointer)
        except AdapterHubError as error:
            pointer.problem = str(error)
            log.error("%s stays on %s: %s is not ready: %s", pointer.ref, pointer.ready, coming, error)
        finally:
            pointer.move = None

    def _flip(self, pointer: Pointer) -> None:
        log.info("%s moves from %s to %s", pointer.ref, pointer.ready, pointer.wanted)
        event = event_of(pointer.ref, pointer.ready, pointer.wanted)
        pointer.ready, pointer.problem = pointer.wanted, ""
        self._tell(event)
