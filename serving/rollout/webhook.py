"""Tells a URL of the operator's what happened, and never keeps a request waiting for it.

    POST URL
    X-AdapterHub-Event: canary.rollback
    X-AdapterHub-Id: 5f2c…                     the same from every server that saw the same move
    X-AdapterHub-Timestamp: 1764081600
    X-AdapterHub-Signature: sha256=…           HMAC of "TIMESTAMP.BODY" with the secret, where there is one

An answer of 2xx takes it. What is refused for good (4xx) is dropped with a line in the log; all else is tried again
with growing pauses. Events wait in memory, in their order, and the oldest goes when there are too many.
"""

from __future__ import annotations

import asyncio
import hashlib
import hmac
import json
import logging
import time
from collections import deque
from collections.abc import Awaitable, Callable

import httpx

from adapterhub.errors import UsageError
from adapterhub.serving.rollout.events import Event

log = logging.getLogger(__name__)

_MOST = 1000  # events that wait
_TRIES = 8
_LONGEST_PAUSE = 60.0  # seconds
_PATIENCE = 10.0  # seconds, for an answer
_AGAIN = frozenset({408, 425, 429})  # refusals that pass


class Webhook:
    """The way out for events. One event loop; not for threads."""

    def __init__(
        self,
        url: str,
        *,
        secret: str = "",
        server: str,
        transport: httpx.AsyncBaseTransport | None = None,
        sleep: Callable[[float], Awaitable[None]] = asyncio.sleep,
    ) -> None:
        """``server`` says who tells it. Raises UsageError for what is no URL."""
        check_url(url)
        self._url = url
        self._secret = secret
        self._server = server
        self._transport = transport
        self._sleep = sleep
        self._waiting: deque[Event] = deque(maxlen=_MOST)
        self._has_some = asyncio.Event()

    def tell(self, event: Event) -> None:
        """Returns at once."""
        if len(self._waiting) == _MOST:
            log.warning("the webhook is behind: an event of %s is lost", self._waiting[0].ref)
        self._waiting.append(event)
        self._has_some.set()

    async def deliver(self) -> None:
        """Deliver what comes, one after another, until cancelled."""
        async with httpx.AsyncClient(transport=self._transport, timeout=_PATIENCE, follow_redirects=False) as client:
            while True:
                await self._has_some.wait()
                while self._waiting:
                    await self._deliver(client, self._waiting.popleft())
                self._has_some.clear()

    async def _deliver(self, client: httpx.AsyncClient, event: Event) -> None:
        body = json.dumps({**event.to_plain(), "server": self._server}).encode()
        for number in range(_TRIES):
            try:
                answer = await client.post(self._url, content=body, headers=self._headers(event, body))
                said, takes_more = f"{answer.status_code}", answer.status_code >= 500 or answer.status_code in _AGAIN
                if answer.is_success:
                    return
            except httpx.HTTPError as error:
                said, takes_more = repr(error), True
            if not takes_more:
                break
            if number < _TRIES - 1:
                await self._sleep(min(_LONGEST_PAUSE, 2.0**number))
        log.error("the webhook did not take %s of %s: %s", event.kind, event.ref, said)

    def _headers(self, event: Event, body: bytes) -> dict[str, str]:
        moment = str(int(time.time()))
        headers = {
            "content-type": "application/json",
            "x-adapterhub-event": event.kind,
            "x-adapterhub-id": event.id,
            "x-adapterhub-timestamp": moment,
        }
        if self._secret:
            headers["x-adapterhub-signature"] = "sha256=" + signature(self._secret, moment, body)
        return headers


def signature(secret: str, timestamp: str, body: bytes) -> str:
    """What a receiver computes and compares (in constant time: `hmac.compare_digest`). Hex."""
    return hmac.new(secret.encode(), timestamp.encode() + b"." + body, hashlib.sha256).hexdigest()


def check_url(url: str) -> None:
    """Raises UsageError."""
    try:
        parsed = httpx.URL(url)
    except httpx.InvalidURL as error:
        raise UsageError(f"--webhook {url!a} is no URL", why=str(error)) from error
    if parsed.scheme not in ("http", "https") or not parsed.host:
        raise UsageError(f"--webhook {url!a} is no URL", why="it is like https://hooks.example.com/adapterhub")
