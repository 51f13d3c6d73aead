"""How long a prompt is, by the engine's own count."""

from __future__ import annotations

import asyncio
import json
from collections.abc import MutableMapping
from typing import Any

from adapterhub.errors import EngineError, UsageError

Message = MutableMapping[str, Any]


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
