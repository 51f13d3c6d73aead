"""The way of a request, as a pure ASGI middleware around vLLM's own application.

    allow-list → key → limits → model → version that is ready here → turn → lease → the engine, under the immutable name

What comes back streams through untouched; only headers are added. Outermost of all, so nothing of vLLM is reached
around it. Without a replica behind it (the plug-in did not start) it answers nothing at all.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import uuid
from collections.abc import Awaitable, Callable, MutableMapping
from dataclasses import dataclass, field
from typing import Any

from adapterhub.errors import (
    AdapterError,
    AdapterHubError,
    BaseMismatch,
    EngineError,
    Gone,
    IntegrityError,
    NotFound,
    StorageError,
    TooLarge,
)
from adapterhub.refs import AdapterRef
from adapterhub.registry.base import Version
from adapterhub.serving import exposition, lengths, tenancy
from adapterhub.serving.admission import Turn, counting, prompt_tokens, sequences
from adapterhub.serving.answers import error_answer, error_headers
from adapterhub.serving.arguments import BASE_NAME
from adapterhub.serving.callers import CALLER, SINGLE_USER, Caller
from adapterhub.serving.canary import caller_of, pick
from adapterhub.serving.counting import Account, count_prompt
from adapterhub.serving.deployment import Deployment
from adapterhub.serving.fairness import Ask
from adapterhub.serving.quota import Quota
from adapterhub.serving.replica import Replica
from adapterhub.serving.trials import Sample

Scope = MutableMapping[str, Any]
Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
App = Callable[[Scope, Receive, Send], Awaitable[None]]
Headers = list[tuple[bytes, bytes]]

_AT_ONCE = 0.005  # seconds: a request whose turn comes later than that has waited


class ClientLeft(Exception):
    """The client went away before its request was complete."""


@dataclass
class Admitted:
    """A request as the engine gets it, and the headers that its answer gets."""

    scope: Scope
    receive: Receive
    headers: Headers = field(default_factory=list)
    turn: Turn | None = None  # where it needs the engine's sequences
    account: Account | None = None  # where its tokens are limited
    sample: Sample | None = None  # where its version is on trial
    is_model: bool = False
    metrics_of: str | None = None  # the tenant whose metrics alone may be shown


class TenancyMiddleware:
    """Given to vLLM with ``--middleware``; finds the replica in the application's state."""

    def __init__(self, app: App) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan":
            await self._app(scope, receive, send)
        elif scope["type"] == "http":
            await self._http(scope, receive, send)
        else:  # websockets: vLLM's realtime route knows nothing of tenants
            await send({"type": "websocket.close", "code": 1008})

    async def _http(self, scope: Scope, receive: Receive, send: Send) -> None:
        request_id = tenancy.request_id_of(dict(scope["headers"])) or uuid.uuid4().hex
        async with contextlib.AsyncExitStack() as until_the_last_byte:
            try:
                admitted = await self._admit(scope, receive, until_the_last_byte, request_id)
            except ClientLeft:
                return
            except AdapterHubError as error:
                await _refuse(send, error, path=scope["path"], request_id=request_id)
                return
            except Exception as error:  # noqa: BLE001 - a bug of ours: vLLM would send its text, whatever it names
                broken = AdapterHubError("a request met a bug", why=repr(error))
                broken.__cause__ = error
                await _refuse(send, broken, path=scope["path"], request_id=request_id)
                return
            admitted.headers.append((b"x-request-id", request_id.encode()))
            if admitted.turn is not None:
                send = counting(send, admitted.turn)
            if admitted.account is not None:
                send = admitted.account.counting(send)
            if admitted.is_model:
                send = _without_insides(send, path=scope["path"], request_id=request_id)
            if admitted.metrics_of is not None:
                send = exposition.only(send, admitted.metrics_of)
            if admitted.sample is not None:
                until_the_last_byte.enter_context(admitted.sample)
                send = admitted.sample.watching(send)
            await self._app(admitted.scope, admitted.receive, _with_headers(send, admitted.headers))

    async def _admit(
        self, scope: Scope, receive: Receive, until_the_last_byte: contextlib.AsyncExitStack, request_id: str
    ) -> Admitted:
        """Raises AdapterHubError for what is refused, ClientLeft."""
        tenancy.check_headers(scope["headers"])
        route = tenancy.find_route(scope["method"], scope.get("raw_path") or scope["path"].encode(), scope["path"])
        replica = _replica(scope, route)
        caller = _caller(replica, route, scope["headers"])
        scope = {**scope, CALLER: caller}
        clean: Headers = [*tenancy.strip_headers(scope["headers"]), (b"x-request-id", request_id.encode())]
        if route.kind != "model":
            return await _pass(scope, receive, clean, route, caller)

        await replica.quota.count_request(caller)
        body = tenancy.read_body(await _read(scope, receive))
        ref = tenancy.read_model(body, caller)
        tenancy.check_body(body)  # before anything is loaded for it
        body = await self._within_lengths(scope, route, caller, body)
        account = await _reserve(replica.quota, caller, route, body, until_the_last_byte)
        model, template, added = BASE_NAME, None, [(b"x-adapterhub-version", BASE_NAME.encode())]
        turn, sample = None, None
        if ref is not None:
            deployment = await _deployment(replica, ref)
            version = pick(deployment.shares, ref=ref, caller=caller_of(body, key=caller.key, tenant=caller.tenant))
            sample = replica.trials.sample(ref, deployment, version) if route.fills_cache else None
            model = str(version.record.ref)
            # before the turn: a load holds no sequence
            await _ensure(replica, version, sample)
        if route.fills_cache:
            ask = _ask(replica, caller, ref, body, model)
            turn, receive = await _take_turn(replica, caller, ask, until_the_last_byte, receive)
        if ref is not None:
            await until_the_last_byte.enter_async_context(replica.residency.lease(version.record))
            template = replica.versions.chat_template(version.record)
            added = _version_headers(version)
        added += await replica.quota.headers(caller)
        sent = tenancy.rewrite(body, route=route, caller=caller, model=model, chat_template=template)
        raw = json.dumps(sent).encode()
        clean.append((b"content-length", str(len(raw)).encode()))
        return Admitted({**scope, "headers": clean}, _replay(raw, receive), added, turn, account, sample, is_model=True)

    async def _within_lengths(
        self, scope: Scope, route: tenancy.Route, caller: Caller, body: dict[str, Any]
    ) -> dict[str, Any]:
        """The body, with its answer bounded as the caller's limits say. Raises UsageError."""
        lengths.check_answers(body)
        most, context = caller.least("output"), caller.least("context")
        if context is not None and route.fills_cache:
            counts = [
                await count_prompt(self._app, scope, path, asked | {"model": BASE_NAME})
                for path, asked in lengths.counting_requests(body, route.path)
            ]
            left = lengths.room(context=context, prompt=max([lengths.ids_length(body), *counts]))
            most = left if most is None else min(most, left)
        return lengths.with_output(body, route.path, most)


async def _refuse(send: Send, error: AdapterHubError, *, path: str, request_id: str) -> None:
    status, body = error_answer(error, path=path, request_id=request_id)
    headers = [(b"content-type", b"application/json"), (b"content-length", str(len(body)).encode())]
    headers += [*error_headers(error), (b"x-request-id", request_id.encode())]
    await send({"type": "http.response.start", "status": status, "headers": headers})
    await send({"type": "http.response.body", "body": body})


def _without_insides(send: Send, *, path: str, request_id: str) -> Send:
    """What the engine says of its own failures goes no further: it may name files, and other tenants' adapters."""
    broken = False

    async def sending(message: Message) -> None:
        nonlocal broken
        if message["type"] == "http.response.start" and message["status"] >= 500:
            broken = True
            error = EngineError("the engine could not answer", why=f"it said {message['status']}; its log says why")
            await _refuse(send, error, path=path, request_id=request_id)
        elif not broken:
            await send(message)

    return sending


async def _pass(scope: Scope, receive: Receive, clean: Headers, route: tenancy.Route, caller: Caller) -> Admitted:
    """A request whose body names no model: as it is, and not longer than others. Raises TooLarge, ClientLeft."""
    if scope["method"] == "POST":
        raw = await _read(scope, receive)
        clean.append((b"content-length", str(len(raw)).encode()))
        receive = _replay(raw, receive)
    only = caller.tenant if route.kind == "metrics" and "admin" not in caller.scopes else None
    if only is not None:
        clean = [(name, value) for name, value in clean if name != b"accept-encoding"]  # to be read here
    return Admitted({**scope, "headers": clean}, receive, metrics_of=only)


async def _reserve(
    quota: Quota,
    caller: Caller,
    route: tenancy.Route,
    body: dict[str, Any],
    until_the_last_byte: contextlib.AsyncExitStack,
) -> Account | None:
    """Hold tokens of the caller's minute until the last byte. Raises TooManyRequests."""
    if caller.least("tokens_per_minute") is None or not route.fills_cache:
        return None
    prompt = prompt_tokens(body)
    guess = lengths.guess(body, route.path, prompt=prompt, answers=sequences(body))
    reservation, account = await quota.reserve(caller, tokens=guess), Account(prompt=prompt)

    async def settle() -> None:
        await reservation.settle(tokens=account.tokens)

    until_the_last_byte.push_async_callback(settle)
    return account


async def _ensure(replica: Replica, version: Version, sample: Sample | None) -> None:
    """Loaded, or an error that counts against a version on trial where it is the version's own."""
    try:
        await replica.ensure(version.record)
    except (AdapterError, BaseMismatch, IntegrityError):
        if sample is not None:
            sample.fail()
        raise


def _ask(replica: Replica, caller: Caller, ref: AdapterRef | None, body: dict[str, Any], model: str) -> Ask:
    """What a request wants of the engine. Without keys everybody is one tenant: then an adapter's owner counts."""
    return Ask(
        tenant=caller.tenant or (ref.name.tenant if ref else BASE_NAME),
        adapter=model if ref else None,
        since=replica.admission.now(),
        prompt=prompt_tokens(body),
        sequences=sequences(body),
        weight=caller.weight,
    )


async def _take_turn(
    replica: Replica, caller: Caller, ask: Ask, until_the_last_byte: contextlib.AsyncExitStack, receive: Receive
) -> tuple[Turn, Receive]:
    """Wait for the engine, and no longer than the client does. Raises ClientLeft, TooManyRequests.

    What was heard of the client meanwhile is said again to the engine.
    """
    entering = asyncio.ensure_future(_enter(replica, caller, ask, until_the_last_byte))
    leaving = asyncio.ensure_future(receive())
    until_the_last_byte.callback(leaving.cancel)
    both = {entering, leaving}
    try:
        await asyncio.wait(both, timeout=_AT_ONCE, return_when=asyncio.FIRST_COMPLETED)
        if not entering.done():
            with replica.quota.waiting(caller):
                await asyncio.wait(both, return_when=asyncio.FIRST_COMPLETED)
    finally:
        if not entering.done():
            entering.cancel()
            await asyncio.gather(entering, return_exceptions=True)
    if entering.cancelled():
        raise ClientLeft
    heard = [leaving]

    async def receiving() -> Message:
        return await (heard.pop() if heard else receive())

    return entering.result(), receiving


async def _enter(replica: Replica, caller: Caller, ask: Ask, until_the_last_byte: contextlib.AsyncExitStack) -> Turn:
    await until_the_last_byte.enter_async_context(replica.quota.slot(caller))
    return await until_the_last_byte.enter_async_context(replica.admission.turn(ask))


def _caller(replica: Replica, route: tenancy.Route, headers: Headers) -> Caller:
    """Who asks, and whether they may come in here. Raises Unauthorized, Forbidden, UsageError, StorageError."""
    if not replica.access.needs_keys:
        sent = dict(headers)
        tenancy.check_browser(_text(sent.get(b"host")), _text(sent.get(b"origin")))
    if route.kind == "open":
        return SINGLE_USER
    caller = replica.access.caller(headers)
    if route.scope is not None:
        caller.check_scope(route.scope)
    return caller


def _text(header: bytes | None) -> str | None:
    return None if header is None else header.decode("latin-1")


def _replica(scope: Scope, route: tenancy.Route) -> Replica:
    replica: Replica | None = getattr(scope["app"].state, "adapterhub", None)
    if replica is None:
        raise EngineError("AdapterHub did not start in this engine", why="ADAPTERHUB_SERVE or VLLM_PLUGINS is not set")
    if replica.not_ready and route.path not in tenancy.ALWAYS_OPEN:
        raise EngineError("the server is not ready", why=replica.not_ready)
    return replica


async def _deployment(replica: Replica, ref: AdapterRef) -> Deployment:
    """What is asked for, with the registry's own words kept from the client: they name its address."""
    try:
        return await replica.rollout.deployment(ref)
    except NotFound as error:
        raise tenancy.not_found(ref) from error
    except Gone:
        raise
    except AdapterHubError as error:
        raise StorageError(f"{ref} cannot be looked up", why=str(error)) from error


def _version_headers(version: Version) -> Headers:
    record = version.record
    headers = [
        (b"x-adapterhub-version", str(record.ref).encode()),
        (b"x-adapterhub-digest", record.digest.encode()),
    ]
    if version.status == "deprecated":
        why = "".join(c if " " <= c <= "~" else "?" for c in version.why) or "yes"
        headers.append((b"x-adapterhub-deprecated", why.encode()))
    return headers


async def _read(scope: Scope, receive: Receive) -> bytes:
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


def _replay(body: bytes, receive: Receive) -> Receive:
    """The rewritten body first, then whatever the server says: that is how the engine hears of a client that left."""
    pending: list[Message] = [{"type": "http.request", "body": body, "more_body": False}]

    async def replayed() -> Message:
        return pending.pop() if pending else await receive()

    return replayed


def _with_headers(send: Send, added: Headers) -> Send:
    names = {name for name, _ in added}

    async def sending(message: Message) -> None:
        if message["type"] == "http.response.start":
            kept = [(name, value) for name, value in message.get("headers", ()) if name.lower() not in names]
            message = {**message, "headers": [*kept, *added]}
        await send(message)

    return sending
