"""Who may come in, as a running server knows it: a `Directory` that is read again every few seconds.

    database away, locked, broken   ──►  what is known goes on, for `bound` seconds
    longer than that                ──►  503 for everybody: a key that was revoked meanwhile must not open for ever

A request never waits for the database.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Awaitable, Callable, Iterable

from adapterhub.errors import AdapterHubError, StorageError
from adapterhub.serving.tenants.callers import SINGLE_USER, Caller
from adapterhub.serving.tenants.keys import Directory, presented_key

log = logging.getLogger(__name__)

BOUND_SECONDS = 300.0
Read = Callable[[], Awaitable[Directory | None]]  # None: nothing has changed


class Access:
    """The door. Without ``read`` (no keys) everybody is the single user. One event loop; not for threads."""

    def __init__(
        self, read: Read | None = None, *, bound: float = BOUND_SECONDS, clock: Callable[[], float] = time.monotonic
    ) -> None:
        """``bound`` is how many seconds the last good look counts."""
        self._read = read
        self._bound = bound
        self._clock = clock
        self._directory = Directory()
        self._looked: float | None = None  # when the last good look began
        self._away = False

    @property
    def needs_keys(self) -> bool:
        return self._read is not None

    @property
    def is_away(self) -> bool:
        """Whether the last look failed."""
        return self._away

    @property
    def directory(self) -> Directory:
        return self._directory

    def caller(self, headers: Iterable[tuple[bytes, bytes]]) -> Caller:
        """Who sends a request with these headers. Raises Unauthorized, StorageError."""
        if self._read is None:
            return SINGLE_USER
        if self._looked is None or self._clock() - self._looked > self._bound:
            raise StorageError("keys cannot be checked", why="the database of tenants and keys is out of reach")
        return self._directory.caller(presented_key(headers))

    async def look(self) -> None:
        """Read what changed. Raises StorageError."""
        if self._read is None:
            return
        begun = self._clock()
        self._directory = await self._read() or self._directory
        self._looked = begun

    async def watch(self, *, poll_seconds: float) -> None:
        """Look again and again, until cancelled."""
        while self.needs_keys:
            await asyncio.sleep(poll_seconds)
            try:
                await self.look()
            except AdapterHubError as error:
                if not self._away:
                    log.error(
                        "tenants and keys cannot be read; what is known counts for %.0f s more: %s", self._bound, error
                    )
                self._away = True
                continue
            if self._away:
                log.warning("tenants and keys can be read again")
            self._away = False
