"""A stop: what runs ends well, what comes is sent elsewhere."""

from __future__ import annotations

import asyncio
from typing import Any

import httpx
import pytest
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, StreamingResponse

from adapterhub.serving import routes
from adapterhub.serving.draining import drain
from adapterhub.serving.middleware import TenancyMiddleware
from adapterhub.serving.replica import Replica

pytestmark = pytest.mark.anyio

CHAT = "/v1/chat/completions"


@pytest.fixture
def gate() -> asyncio.Event:
    return asyncio.Event()


@pytest.fixture
def client(replica: Replica, gate: asyncio.Event) -> httpx.AsyncClient:
    """Answers come when the gate is open, streams a piece before."""

    async def answer(request: Request) -> Any:
        async def pieces() -> Any:
            yield "data: {}\n\n"
            await gate.wait()
            yield "data: [DONE]\n\n"

        if (await request.json()).get("stream"):
            return StreamingResponse(pieces(), media_type="text/event-stream")
        await gate.wait()
        return JSONResponse({})

    app = Starlette()
    app.add_route(CHAT, answer, methods=["POST"])
    app.add_route("/ready", routes.ready)
    app.state.adapterhub = replica
    app.add_middleware(TenancyMiddleware)
    return httpx.AsyncClient(transport=httpx.ASGITransport(app=app), base_url="http://localhost:8000")


async def ask(client: httpx.AsyncClient, **body: Any) -> httpx.Response:
    return await client.post(CHAT, json={"model": "base", "messages": []} | body)


async def test_what_runs_is_finished_and_what_comes_is_refused(
    client: httpx.AsyncClient, replica: Replica, gate: asyncio.Event, engine: Any
) -> None:
    ended = asyncio.Event()
    running = [asyncio.create_task(ask(client, stream=stream)) for stream in (True, False)]
    await engine.until(lambda: replica.under_way.count == 2)
    draining = asyncio.create_task(drain(replica.under_way, close=replica.close, end=ended.set))
    await engine.until(lambda: replica.not_ready)
    ready, refused = await client.get("/ready"), await ask(client)
    assert (ready.status_code, ready.json()["reason"]) == (503, "it is shutting down")
    assert refused.status_code == 503
    assert (refused.headers["retry-after"], refused.headers["connection"]) == ("5", "close")
    assert not ended.is_set()
    gate.set()
    answers = await asyncio.gather(*running)
    await draining
    assert [a.status_code for a in answers] == [200, 200]
    assert answers[0].text.endswith("[DONE]\n\n")
    assert ended.is_set() and replica.under_way.count == 0


async def test_a_client_that_left_is_not_waited_for(client: httpx.AsyncClient, replica: Replica, engine: Any) -> None:
    running = asyncio.create_task(ask(client))
    await engine.until(lambda: replica.under_way.count == 1)
    draining = asyncio.create_task(drain(replica.under_way, close=replica.close, end=lambda: None))
    running.cancel()
    await draining


async def test_with_nothing_under_way_it_ends_at_once(replica: Replica) -> None:
    ended = asyncio.Event()
    await drain(replica.under_way, close=replica.close, end=ended.set)
    assert ended.is_set()
