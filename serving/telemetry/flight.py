"""One request from its first byte to its last: where its time went, how it ended, and what it took.

    flight = Flight(path)
    flight.lap("admit")                     # everything since the last lap was that
    send = flight.sending(send)             # sees the status, and whether the last byte went out
    flight.end(error)

Times are of one clock (`time.perf_counter`), in seconds. Whatever counts, logs or traces reads a flight that is over.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any, Literal, Protocol

from adapterhub.errors import AdapterHubError
from adapterhub.serving.bill.account import Account
from adapterhub.serving.rollout.trials import BROKEN
from adapterhub.serving.tenants.callers import Caller
from adapterhub.serving.wire import Message, Receive, Send


class TokenCame(Protocol):
    """Is told of new tokens of the answer."""

    def __call__(self, *, output: int) -> None: ...


Outcome = Literal["refused", "ok", "failed", "cancelled"]
# What a request waits for that is not ours to be quick at: its client, the engine, a load, its turn.
WAITS = frozenset({"read", "count", "load", "queue", "lease", "generate"})


class Flight:
    """One request. One event loop; not for threads."""

    def __init__(self, path: str, request_id: str) -> None:
        self.path = path  # as it came
        self.route = "(none)"  # the route of the allow-list that it is
        self.request_id = request_id
        self.began = self._last = time.perf_counter()
        self.laps: list[tuple[str, float, float]] = []  # name, begin, end
        self.caller: Caller | None = None  # once it is known
        self.model = ""  # as the engine knows it; empty before that is known
        self.generates = False  # whether it went to the engine, for an answer of tokens
        self.account = Account(came=self._came)
        self.streams = False
        self.status = 0
        self.error: AdapterHubError | None = None  # why it was refused
        self.first_token: float | None = None
        self.last_token = 0.0
        self.gap: Callable[[float], None] = _nothing  # told of the seconds between two tokens of a stream
        self.token_came: TokenCame = _no_token  # told of tokens
        self.span: Any = None  # OpenTelemetry's, where traces are on; `tracing` begins and ends it
        self.generating: Any = None
        self._broke = False  # the engine said so inside a stream
        self._left = False
        self._went_out = False

    def lap(self, name: str) -> None:
        now = time.perf_counter()
        self.laps.append((name, self._last, now))
        self._last = now

    def spans(self) -> dict[str, float]:
        """Seconds by name. What is not in `WAITS` was spent in this package."""
        found: dict[str, float] = {}
        for name, begin, end in self.laps:
            found[name] = found.get(name, 0.0) + end - begin
        return found

    @property
    def ended(self) -> float:
        """When its last lap was over."""
        return self._last

    @property
    def seconds(self) -> float:
        return self._last - self.began

    @property
    def outcome(self) -> Outcome:
        if self.error is not None:
            return "refused"
        if self.status >= 400 or self._broke:
            return "failed"
        if self._went_out and not self._left:
            return "ok"
        return "cancelled" if self._left or not self.status else "failed"

    def sending(self, send: Send) -> Send:
        """``send``, watched."""

        async def sending(message: Message) -> None:
            if message["type"] == "http.response.start":
                self.status = message["status"]
                self.streams = any(
                    name == b"content-type" and value.startswith(b"text/event-stream")
                    for name, value in message.get("headers", ())
                )
            elif message.get("body", b"").startswith(BROKEN):
                self._broke = True
            await send(message)
            if not message.get("more_body") and message["type"] == "http.response.body":
                self._went_out = True

        return sending

    def receiving(self, receive: Receive) -> Receive:
        """``receive``, watched: it says when the client has left."""

        async def receiving() -> Message:
            message = await receive()
            if message["type"] == "http.disconnect" and not self._went_out:
                self._left = True
            return message

        return receiving

    def broke(self, error: BaseException) -> None:
        """The engine's application raised: its client left, or something broke."""
        self._left = self._left or not isinstance(error, Exception) or isinstance(error, OSError)
        self._went_out = False

    def _came(self, tokens: int) -> None:
        now = time.perf_counter()
        if self.first_token is None:
            self.first_token = now
        elif self.streams:
            self.gap(now - self.last_token)
        self.last_token = now
        self.token_came(output=tokens)


def _nothing(seconds: float) -> None:
    pass


def _no_token(*, output: int) -> None:
    pass
