"""Counts what is used, and brings it to the ledger every few seconds. Requests never wait for it.

    request ends ──► add ──► tally (memory) ──flush──► spool (disk) ──► ledger (database)

A server that is killed loses what it counted since its last flush, and nothing else; nothing is ever booked twice.
While the database is locked, away or broken, batches wait in the spool; a disk that is full leaves them in memory.
"""

from __future__ import annotations

import asyncio
import logging
import time
import uuid
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime
from pathlib import Path

from adapterhub.errors import AdapterHubError
from adapterhub.serving.bill.ledger import Ledger
from adapterhub.serving.bill.spool import Spool, left_behind
from adapterhub.serving.usage import Batch, Counts, Line, Tally, hour_of

log = logging.getLogger(__name__)

FLUSH_SECONDS = 5.0
_AT_ONCE = 200  # batches in one transaction: others want the database too


class Metering:
    """The counts of one server. One event loop; not for threads."""

    def __init__(
        self,
        ledger: Ledger,
        folder: Path,
        *,
        keyed: bool,
        clock: Callable[[], float] = time.monotonic,
        now: Callable[[], datetime] = lambda: datetime.now(UTC),
    ) -> None:
        """``folder`` is for spools; ``keyed``: whether there are tenants. Raises StorageError."""
        self._writer = uuid.uuid4().hex
        self._tally = Tally(self._writer)
        self._ledger = ledger
        self._folder = folder
        self._spool = Spool(self._own)
        self._keyed = keyed
        self._clock = clock
        self._now = now
        self._resident: dict[str, float] = {}  # model → up to when its residence is counted
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="metering")  # others may hang on the registry
        self._flushing = asyncio.Lock()
        self._has_taken_up = False
        self._is_closed = False
        self._problem = ""
        self._booked_at = clock()

    @property
    def _own(self) -> Path:
        return self._folder / f"{self._writer}.jsonl"

    @property
    def lag(self) -> float:
        """Seconds since all that was counted was in the ledger."""
        return self._clock() - self._booked_at

    def add(self, line: Line, counts: Counts) -> None:
        self._tally.add(line, counts, hour=hour_of(self._now()))

    def loaded(self, model: str) -> None:
        """A version was brought into the engine's memory, and is there from now on."""
        self._resident[model] = self._clock()
        self.add(Line.of_owner(model, keyed=self._keyed), Counts(cold_loads=1))

    def forgot(self, model: str) -> None:
        """It is gone."""
        self._count_residence(model)
        self._resident.pop(model, None)

    def _count_residence(self, model: str) -> None:
        since, until = self._resident.get(model), self._clock()
        if since is not None and (milliseconds := int((until - since) * 1000)) > 0:
            self._resident[model] = since + milliseconds / 1000  # the rest counts the next time
            self.add(Line.of_owner(model, keyed=self._keyed), Counts(resident_ms=milliseconds))

    async def flush(self) -> None:
        """Everything counted so far to disk, and to the database where it can be."""
        async with self._flushing:
            for model in [*self._resident]:
                self._count_residence(model)
            begun = self._clock()
            await asyncio.get_running_loop().run_in_executor(self._thread, self._write, self._tally.take())
            if not self._spool.waiting:
                self._booked_at = begun

    async def watch(self, *, seconds: float = FLUSH_SECONDS) -> None:
        """Flush again and again, until cancelled."""
        while not self._is_closed:
            await self.flush()
            await asyncio.sleep(seconds)
        await asyncio.Event().wait()  # a watcher that ends is a fault

    async def close(self) -> None:
        """The last flush. Again is nothing."""
        if self._is_closed:
            return
        self._is_closed = True
        for model in [*self._resident]:
            self.forgot(model)
        await self.flush()
        self._spool.close()
        self._thread.shutdown(wait=False)

    # ── on the thread ────────────────────────────────────────────────────────────────────────────────────────

    def _write(self, batch: Batch | None) -> None:
        problem = ""
        try:
            if batch is not None:
                self._spool.append(batch)
        except AdapterHubError as error:
            problem = f"usage waits in memory: {error}"
        try:
            self._book(self._spool)
            self._take_up()
        except AdapterHubError as error:
            problem = problem or f"usage waits in {self._folder}: {error}"
        if problem and problem != self._problem:
            log.error("%s", problem)
        elif self._problem and not problem:
            log.warning("usage can be written again")
        self._problem = problem

    def _take_up(self) -> None:
        """What servers before this one could not bring to the ledger."""
        if self._has_taken_up:
            return
        for spool in left_behind(self._folder, own=self._own):
            self._book(spool)
        self._has_taken_up = True

    def _book(self, spool: Spool) -> None:
        while some := spool.waiting[:_AT_ONCE]:
            self._ledger.book(some)
            spool.booked(len(some))
