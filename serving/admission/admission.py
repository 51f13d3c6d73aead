"""Requests wait here for their turn at the engine; `fairness.Line` says whose it is. One event loop; not for threads.

async with admission.turn(Ask(tenant="acme", adapter="acme/support@3", since=now())) as turn:
    ...                          # in the engine until the block ends
    turn.count(output=1)         # as tokens come
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import AsyncIterator, Callable, Mapping
from typing import Any

from adapterhub.serving.admission.fairness import Ask, Grant, Line, Window

_BYTES_PER_TOKEN = 4  # about


class Turn:
    """A request's time in the engine."""

    def __init__(self, line: Line, grant: Grant) -> None:
        self._line = line
        self.grant = grant

    def count(self, *, output: int) -> None:
        """More tokens of the answer came."""
        self._line.count(self.grant, output=output)


class Admission:
    """The line in front of one engine."""

    def __init__(self, window: Window, *, clock: Callable[[], float] = time.monotonic) -> None:
        self.line = Line(window)
        self.now = clock
        self._called: dict[Ask, asyncio.Future[Grant]] = {}
        self._alarm: asyncio.TimerHandle | None = None

    @contextlib.asynccontextmanager
    async def turn(self, ask: Ask) -> AsyncIterator[Turn]:
        """Wait for the turn, and hold it until the block ends."""
        turn = await self.take(ask)
        try:
            yield turn
        finally:
            self.give_back(turn)

    async def take(self, ask: Ask) -> Turn:
        """Wait for the turn; it must be given back."""
        return Turn(self.line, await self._wait(ask))

    def give_back(self, turn: Turn) -> None:
        self.line.end(turn.grant, self.now())
        if self._called:
            self._call()

    def take_at_once(self, ask: Ask) -> Turn | None:
        """Like `take` where that would not wait; else None."""
        now = self.now()
        if not self.line.is_free(ask, now):
            return None
        self.line.join(ask)
        grant = self.line.next(now)
        assert grant is not None and grant.ask is ask, "nobody else waits, and there is room"
        return Turn(self.line, grant)

    async def _wait(self, ask: Ask) -> Grant:
        called: asyncio.Future[Grant] = asyncio.get_running_loop().create_future()
        self._called[ask] = called
        self.line.join(ask)
        self._call()
        try:
            return await called
        except asyncio.CancelledError:
            if self._called.pop(ask, None):
                self.line.leave(ask)
            elif not called.cancelled():  # its turn came a moment before its client left
                self.line.end(called.result(), self.now())
            self._call()
            raise

    def _call(self) -> None:
        """Call everybody whose turn it is."""
        while grant := self.line.next(self.now()):
            called = self._called.pop(grant.ask)
            if called.cancelled():  # its client left a moment before its turn came
                self.line.end(grant, self.now())
            else:
                called.set_result(grant)
        if self._alarm is not None:
            self._alarm.cancel()
            self._alarm = None
        seconds = self.line.next_change(self.now())
        if seconds is not None:
            self._alarm = asyncio.get_running_loop().call_later(seconds + 0.001, self._call)


def prompt_tokens(size: int) -> int:
    """Of a request whose body is ``size`` bytes, about: enough to weigh one tenant's against another's."""
    return max(1, size // _BYTES_PER_TOKEN)


def sequences(body: Mapping[str, Any]) -> int:
    """How many answers a request asks the engine for: ``n`` of each prompt."""
    n, prompt = body.get("n"), body.get("prompt")
    prompts = len(prompt) if isinstance(prompt, list) and not all(isinstance(part, int) for part in prompt) else 1
    return max(1, prompts) * (n if isinstance(n, int) and n > 0 else 1)
