"""What an answer took, in tokens: for the limits of a minute. And how long a prompt is, by the engine's own count."""

from __future__ import annotations

import asyncio
import json
import re
from collections.abc import Awaitable, Callable, MutableMapping
from typing import Any

from adapterhub.errors import EngineError, UsageError

Message = MutableMapping[str, Any]
Send = Callable[[Message], Awaitable[None]]

_PROMPT = re.compile(rb'"(?:prompt|input)_tokens": ?(\d+)')
_ANSWER = re.compile(rb'"(?:completion|output)_tokens": ?(\d+)')


class Account:
    """Of one answer: its own word for it, else its events and the guess at its prompt."""

    def __init__(self, *, prompt: int) -> None:
        """``prompt`` is a guess, in tokens."""
        self._guess = prompt
        self._events = 0
        self._prompt = 0
        self._answer = 0
        self._status = 0

    @property
    def tokens(self) -> int:
        """Nothing for what was refused."""
        if not 200 <= self._status < 300:
            return 0
        return (self._prompt or self._guess) + max(self._answer, self._events)

    def counting(self, send: Send) -> Send:
        """``send``, and what goes through it is counted."""

        async def sending(message: Message) -> None:
            if message["type"] == "http.response.start":
                self._status = message["status"]
            elif body := message.get("body"):
                self._look(body)
            await send(message)

        return sending

    def _look(self, body: bytes) -> None:
        self._events += body.count(b"data: {")
        if b"_tokens" in body:
            self._prompt = max(self._prompt, *map(int, _PROMPT.findall(body)), 0)
            self._answer = max(self._answer, *map(int, _ANSWER.findall(body)), 0)


async def count_prompt(app: Any, scope: Message, path: str, body: dict[str, Any]) -> int:
    """Tokens of a prompt, asked of the application behind the middleware. Raises UsageError, EngineError."""
    status, answer = await ask_inside(app, scope, path, body)
    try:
        told = json.loads(answer)
        if status == 200:
            return int(told.get("count") or told.get("input_tokens") or 0)
    except ValueError as error:
        raise EngineError("the prompt cannot be counted", why=str(error)) from error
    if status >= 500:
        raise EngineError("the prompt cannot be counted", why=f"the engine answered {status}")
    raise UsageError("the prompt cannot be read", why="it is not what this route takes")


async def ask_inside(app: Any, scope: Message, path: str, body: dict[str, Any]) -> tuple[int, bytes]:
    """POST a body to an application in this process, on behalf of whom ``scope`` is of; returns status and answer."""
    raw = json.dumps(body).encode()
    pending: list[Message] = [{"type": "http.request", "body": raw, "more_body": False}]
    status, answer = 0, b""

    async def receive() -> Message:
        if not pending:  # nobody leaves: vLLM listens for that, and would answer nothing
            await asyncio.Event().wait()
        return pending.pop()

    async def send(message: Message) -> None:
        nonlocal status, answer
        if message["type"] == "http.response.start":
            status = message["status"]
        else:
            answer += message.get("body", b"")

    headers = [(b"content-type", b"application/json"), (b"content-length", str(len(raw)).encode())]
    asked = {
        **scope,
        "method": "POST",
        "path": path,
        "raw_path": path.encode(),
        "query_string": b"",
        "headers": headers,
    }
    await app(asked, receive, send)
    return status, answer
