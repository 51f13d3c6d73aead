"""Messages between the server, us and the engine (ASGI), read and changed on their way. Knows no tenant."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, MutableMapping
from typing import Any

from adapterhub.errors import AdapterHubError, EngineError, TooLarge
from adapterhub.serving import tenancy
from adapterhub.serving.answers import error_answer, error_headers

Scope = MutableMapping[str, Any]
Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
App = Callable[[Scope, Receive, Send], Awaitable[None]]
Headers = list[tuple[bytes, bytes]]


class ClientLeft(Exception):
    """The client went away before its request was complete."""


async def read_all(scope: Scope, receive: Receive) -> bytes:
    """The whole body. Raises TooLarge, ClientLeft."""
    announced = next((value for name, value in scope["headers"] if name == b"content-length"), b"0")
    if announced.isdigit() and int(announced) > tenancy.MAX_BODY:
        raise TooLarge("the body is too large", why=f"at most {tenancy.MAX_BODY} bytes")
    chunks: list[bytes] = []
    size = 0
    while True:
        message = await receive()
        if message["type"] == "http.disconnect":
            raise ClientLeft
        chunks.append(message.get("body", b""))
        size += len(chunks[-1])
        if size > tenancy.MAX_BODY:
            raise TooLarge("the body is too large", why=f"at most {tenancy.MAX_BODY} bytes")
        if not message.get("more_body"):
            return b"".join(chunks)


def replay(body: bytes, receive: Receive) -> Receive:
    """The rewritten body first, then whatever the server says: that is how the engine hears of a client that left."""
    pending: list[Message] = [{"type": "http.request", "body": body, "more_body": False}]

    async def replayed() -> Message:
        return pending.pop() if pending else await receive()

    return replayed


async def refuse(send: Send, error: AdapterHubError, *, path: str, request_id: str) -> None:
    """Answer with an error."""
    status, body = error_answer(error, path=path, request_id=request_id)
    headers = [(b"content-type", b"application/json"), (b"content-length", str(len(body)).encode())]
    headers += [*error_headers(error), (b"x-request-id", request_id.encode())]
    await send({"type": "http.response.start", "status": status, "headers": headers})
    await send({"type": "http.response.body", "body": body})


def without_insides(send: Send, *, path: str, request_id: str) -> Send:
    """What the engine says of its own failures goes no further: it may name files, and other tenants' adapters."""
    broken = False

    async def sending(message: Message) -> None:
        nonlocal broken
        if message["type"] == "http.response.start" and message["status"] >= 500:
            broken = True
            error = EngineError("the engine could not answer", why=f"it said {message['status']}; its log says why")
            await refuse(send, error, path=path, request_id=request_id)
        elif not broken:
            await send(message)

    return sending


def with_headers(send: Send, added: Headers) -> Send:
    """``send``, whose answer gets these headers in place of its own of those names."""
    names = {name for name, _ in added}

    async def sending(message: Message) -> None:
        if message["type"] == "http.response.start":
            kept = [(name, value) for name, value in message.get("headers", ()) if name.lower() not in names]
            message = {**message, "headers": [*kept, *added]}
        await send(message)

    return sending
