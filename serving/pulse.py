"""Whether the engine still turns: it is asked for something that it does between two steps, and given a bound to do it.

An engine whose process lives and whose steps never end answers `is_dead` with no: only its silence tells. The bound
is long (`ah serve --hang-seconds`): a step over many long prompts takes minutes on a small machine.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable

from adapterhub.errors import EngineError

log = logging.getLogger(__name__)

EVERY_SECONDS = 5.0


class Pulse:
    """Of one engine. One event loop; not for threads."""

    def __init__(self, beat: Callable[[], Awaitable[None]], *, within: float, every: float = EVERY_SECONDS) -> None:
        """``beat`` returns once the engine has turned; ``within`` seconds of silence are a hang, 0: never."""
        self.hangs = False
        self._beat = beat
        self._within = within
        self._every = every

    async def watch(self) -> None:
        """For ever."""
        while True:
            await self.look()
            await asyncio.sleep(self._every)

    async def look(self) -> None:
        """Ask once; returns when it has turned, however long that takes: `hangs` is told meanwhile."""
        beat = asyncio.ensure_future(self._beat())
        try:
            await asyncio.wait({beat}, timeout=self._within or None)
            if not beat.done():
                self.hangs = True
                log.error("the engine has not finished a step for %.0f s", self._within)
                await asyncio.wait({beat})
                log.warning("the engine goes on")
            self.hangs = False
        finally:
            beat.cancel()
        if error := beat.exception():
            if not isinstance(error, EngineError):
                raise error
            log.info("no pulse: %s", error)  # an engine that ended says so itself
