"""A stop that nobody notices: no new requests from now on, and the engine ends with the last byte of the last one.

    SIGTERM to `ah serve` ──► guard ──► SIGUSR1 ──► not ready; new requests 503 ──► the last byte ──► SIGTERM to itself

How long that may take is decided in front (`ah serve --drain-seconds`).
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import Callable, Iterator

log = logging.getLogger(__name__)

STOPPING = "it is shutting down"


class UnderWay:
    """The requests that were let in, each until its last byte. One event loop; not for threads."""

    def __init__(self) -> None:
        self.count = 0
        self._none = asyncio.Event()
        self._none.set()

    @contextlib.contextmanager
    def one(self) -> Iterator[None]:
        self.count += 1
        self._none.clear()
        try:
            yield
        finally:
            self.count -= 1
            if not self.count:
                self._none.set()

    async def over(self) -> None:
        """Returns when none is under way."""
        await self._none.wait()


async def drain(under_way: UnderWay, *, close: Callable[[str], None], end: Callable[[], None]) -> None:
    """``close`` the door, with the reason; ``end`` when the last request is over."""
    close(STOPPING)
    log.info("no new requests are taken; %d are under way", under_way.count)
    await under_way.over()
    log.info("nothing is under way any more; the engine ends")
    end()
