"""The way of a request, as a pure ASGI middleware around vLLM's own application.

    allow-list → key → limits → model → version that is ready here → turn → lease → the engine, under the immutable name

What comes back streams through untouched; only headers are added. Outermost of all, so nothing of vLLM is reached
around it. Without a replica behind it (the plug-in did not start) it answers nothing at all.
"""

from __future__ import annotations

import contextlib
import json
import random
from dataclasses import dataclass, field
from typing import Any

from adapterhub.errors import AdapterError, AdapterHubError, BaseMismatch, IntegrityError
from adapterhub.registry.base import Version
from adapterhub.serving import tenancy
from adapterhub.serving.admission import lengths
from adapterhub.serving.admission.admission import prompt_tokens, sequences
from adapterhub.serving.arguments import BASE_NAME
from adapterhub.serving.counting import count_prompt
from adapterhub.serving.door import find_caller, find_deployment, find_replica
from adapterhub.serving.replica import Replica
from adapterhub.serving.rollout.canary import caller_of, pick
from adapterhub.serving.rollout.trials import Sample
from adapterhub.serving.telemetry import exposition
from adapterhub.serving.telemetry.flight import Flight
from adapterhub.serving.tenants.callers import CALLER, Caller
from adapterhub.serving.tenants.quota import Quota
from adapterhub.serving.turns import ask_of, take_turn
from adapterhub.serving.wire import (
    App,
    ClientLeft,
    Headers,
    Receive,
    Scope,
    Send,
    read_all,
    refuse,
    replay,
    with_headers,
    without_insides,
)


@dataclass
class Admitted:
    """A request as the engine gets it, and the headers that its answer gets."""

    scope: Scope
    receive: Receive
    headers: Headers = field(default_factory=list)
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
            await _close(scope)
        elif scope["type"] == "http":
            await self._http(scope, receive, send)
        else:  # websockets: vLLM's realtime route knows nothing of tenants
            await send({"type": "websocket.close", "code": 1008})

    async def _http(self, scope: Scope, receive: Receive, send: Send) -> None:
        request_id = tenancy.request_id_of(dict(scope["headers"])) or f"{random.getrandbits(128):032x}"
        flight = Flight(scope["path"], request_id)
        send = flight.sending(send)
        try:
            async with contextlib.AsyncExitStack() as until_the_last_byte:
                admitted = await self._admit(flight, scope, flight.receiving(receive), until_the_last_byte)
                await self._answer(flight, admitted, send, until_the_last_byte)
        except ClientLeft:
            pass
        except _Refused as refused:
            flight.error = refused.error
            await refuse(send, refused.error, path=scope["path"], request_id=request_id)
        finally:
            flight.lap("finish")
            _tell(scope, flight)

    async def _answer(
        self, flight: Flight, admitted: Admitted, send: Send, until_the_last_byte: contextlib.AsyncExitStack
    ) -> None:
        """Let the engine answer."""
        admitted.headers.append((b"x-request-id", flight.request_id.encode()))
        if admitted.is_model:
            send = without_insides(send, path=flight.path, request_id=flight.request_id)
        if admitted.metrics_of is not None:
            send = exposition.only(send, admitted.metrics_of)
        if admitted.sample is not None:
            until_the_last_byte.enter_context(admitted.sample)
            send = admitted.sample.watching(send)
        flight.lap("rewrite")
        try:
            with flight.account.open():
                await self._app(admitted.scope, admitted.receive, with_headers(send, admitted.headers))
        except BaseException as error:  # a client that left too: the flight is told why it ended, and it goes on up
            flight.broke(error)
            raise
        finally:
            await flight.account.over()
            flight.lap("generate")

    async def _admit(
        self, flight: Flight, scope: Scope, receive: Receive, until_the_last_byte: contextlib.AsyncExitStack
    ) -> Admitted:
        """Raises _Refused, ClientLeft."""
        try:
            return await self._checked(flight, scope, receive, until_the_last_byte)
        except AdapterHubError as error:
            raise _Refused(error) from error
        except ClientLeft:
            raise
        except Exception as error:  # a bug of ours: vLLM would send its text, whatever it names
            broken = AdapterHubError("a request met a bug", why=repr(error))
            broken.__cause__ = error
            raise _Refused(broken) from error

    async def _checked(
        self, flight: Flight, scope: Scope, receive: Receive, until_the_last_byte: contextlib.AsyncExitStack
    ) -> Admitted:
        """Raises AdapterHubError for what is refused, ClientLeft."""
        tenancy.check_headers(scope["headers"])
        route = tenancy.find_route(scope["method"], scope.get("raw_path") or scope["path"].encode(), scope["path"])
        flight.route = route.path
        replica = find_replica(scope, route)
        until_the_last_byte.enter_context(replica.under_way.one())
        # one that is there already was put there in this process: what comes from outside cannot name its own
        caller = flight.caller = scope.get(CALLER) or find_caller(replica, route, scope["headers"])
        replica.telemetry.begin(flight, scope["headers"])
        scope = {**scope, CALLER: caller}
        clean: Headers = [*tenancy.strip_headers(scope["headers"]), (b"x-request-id", flight.request_id.encode())]
        if route.kind != "model":
            return await _pass(scope, receive, clean, route, caller)

        await replica.quota.count_request(caller)
        flight.lap("admit")
        raw = await read_all(scope, receive)
        flight.lap("read")
        came = replica.admission.now()
        body = tenancy.read_body(raw)
        ref = tenancy.read_model(body, caller)
        tenancy.check_body(body)  # before anything is loaded for it
        body = await self._within_lengths(flight, scope, route, caller, body)
        prompt = prompt_tokens(len(raw))
        if route.fills_cache and caller.least("tokens_per_minute") is not None:
            guess = lengths.guess(body, route.path, prompt=prompt, answers=sequences(body))
            await _reserve(flight, replica.quota, caller, guess, until_the_last_byte)
        flight.lap("admit")
        flight.model, manner, added = BASE_NAME, tenancy.Manner(), [(b"x-adapterhub-version", BASE_NAME.encode())]
        sample = None
        if ref is not None:
            deployment = await find_deployment(replica, ref)
            version = pick(deployment.shares, ref=ref, caller=caller_of(body, key=caller.key, tenant=caller.tenant))
            sample = replica.trials.sample(ref, deployment, version) if route.fills_cache else None
            flight.model = str(version.record.ref)
            flight.lap("resolve")
            # before the turn: a load holds no sequence
            await _ensure(replica, version, sample)
            flight.lap("load")
        if route.fills_cache:
            ask = ask_of(caller, ref, body, flight.model, since=came, prompt=prompt)
            turn, receive = await take_turn(replica, caller, ask, until_the_last_byte, receive)
            flight.token_came = turn.count
            flight.lap("queue")
        if ref is not None:
            until_the_last_byte.callback(await replica.residency.hold(version.record))
            flight.lap("lease")
            manner = replica.versions.manner(version.record)
            added = _version_headers(version)
        added += await replica.quota.headers(caller)
        sent = tenancy.rewrite(body, route=route, caller=caller, model=flight.model, manner=manner)
        raw = json.dumps(sent).encode()
        clean.append((b"content-length", str(len(raw)).encode()))
        flight.generates = route.fills_cache
        if traced := replica.telemetry.to_engine(flight):
            names = {name for name, _ in traced}
            clean = [*((name, value) for name, value in clean if name not in names), *traced]
        return Admitted({**scope, "headers": clean}, replay(raw, receive), added, sample, is_model=True)

    async def _within_lengths(
        self, flight: Flight, scope: Scope, route: tenancy.Route, caller: Caller, body: dict[str, Any]
    ) -> dict[str, Any]:
        """The body, with its answer bounded as the caller's limits say. Raises UsageError."""
        lengths.check_answers(body)
        most, context = caller.least("output"), caller.least("context")
        if context is not None and route.fills_cache:
            flight.lap("admit")
            counts = [
                await count_prompt(self._app, scope, path, asked | {"model": BASE_NAME})
                for path, asked in lengths.counting_requests(body, route.path)
            ]
            flight.lap("count")
            left = lengths.room(context=context, prompt=max([lengths.ids_length(body), *counts]))
            most = left if most is None else min(most, left)
        return lengths.with_output(body, route.path, most)


class _Refused(Exception):
    """A request that does not get to the engine."""

    def __init__(self, error: AdapterHubError) -> None:
        super().__init__(str(error))
        self.error = error


async def _close(scope: Scope) -> None:
    """The server ends."""
    replica: Replica | None = getattr(scope["app"].state, "adapterhub", None)
    if replica is not None:
        await replica.telemetry.close()


def _tell(scope: Scope, flight: Flight) -> None:
    replica: Replica | None = getattr(scope["app"].state, "adapterhub", None)
    if replica is not None:
        replica.telemetry.end(flight)


async def _pass(scope: Scope, receive: Receive, clean: Headers, route: tenancy.Route, caller: Caller) -> Admitted:
    """A request whose body names no model: as it is, and not longer than others. Raises TooLarge, ClientLeft."""
    if scope["method"] == "POST":
        raw = await read_all(scope, receive)
        clean.append((b"content-length", str(len(raw)).encode()))
        receive = replay(raw, receive)
    only = caller.tenant if route.kind == "metrics" and "admin" not in caller.scopes else None
    if only is not None:
        clean = [(name, value) for name, value in clean if name != b"accept-encoding"]  # to be read here
    return Admitted({**scope, "headers": clean}, receive, metrics_of=only)


async def _reserve(
    flight: Flight, quota: Quota, caller: Caller, tokens: int, until_the_last_byte: contextlib.AsyncExitStack
) -> None:
    """Hold tokens of the caller's minute until the last byte. Raises TooManyRequests."""
    reservation = await quota.reserve(caller, tokens=tokens)

    async def settle() -> None:
        await reservation.settle(tokens=flight.account.tokens)

    until_the_last_byte.push_async_callback(settle)


async def _ensure(replica: Replica, version: Version, sample: Sample | None) -> None:
    """Loaded, or an error that counts against a version on trial where it is the version's own."""
    try:
        await replica.ensure(version.record)
    except (AdapterError, BaseMismatch, IntegrityError):
        if sample is not None:
            sample.fail()
        raise


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
