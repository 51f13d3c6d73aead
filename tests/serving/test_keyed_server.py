"""A server with keys, through a real ASGI application in vLLM's place: who comes in, what they reach, how much."""

from __future__ import annotations

import asyncio
import json
import random
from collections.abc import AsyncIterator, Callable
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import httpx
import pytest
from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse, PlainTextResponse, StreamingResponse
from prometheus_client import CollectorRegistry, generate_latest

from adapterhub.base import BaseModel
from adapterhub.manifest import Record
from adapterhub.refs import AdapterName
from adapterhub.registry import Registry
from adapterhub.serving import gauges, routes
from adapterhub.serving.bill.ledger import Ledger
from adapterhub.serving.bill.metering import Metering
from adapterhub.serving.config import ServeConfig
from adapterhub.serving.database import default_url, open_database
from adapterhub.serving.middleware import TenancyMiddleware
from adapterhub.serving.replica import Replica
from adapterhub.serving.telemetry.metrics import Metrics
from adapterhub.serving.telemetry.telemetry import Telemetry
from adapterhub.serving.tenants.access import Access
from adapterhub.serving.tenants.callers import Limits
from adapterhub.serving.tenants.keys import Directory, Tenant
from adapterhub.serving.tenants.tenants import Tenants
from adapterhub.serving.usage import Counts, Line

pytestmark = pytest.mark.anyio

CHAT = "/v1/chat/completions"
HELLO = [{"role": "user", "content": "hi"}]
PATHS = [CHAT, "/v1/completions", "/v1/messages", "/v1/responses", "/v1/embeddings", "/tokenize", "/detokenize",
         "/v1/messages/count_tokens", "/v1/load_lora_adapter", "/invocations", "/adapters"]  # fmt: skip


class Server:
    """The application, its door, and clients for it."""

    def __init__(self, replica: Replica, tenants: Tenants, tokens: Any, metrics: CollectorRegistry) -> None:
        self.replica = replica
        self.metrics = metrics
        self.tokens = tokens  # a `conftest.TokenEngine`
        self.tenants = tenants
        self.seen: list[dict[str, Any]] = []
        self.headers: list[dict[str, str]] = []
        self.status = 200
        self.gate = asyncio.Event()
        self.gate.set()
        app = FastAPI()
        for path in PATHS:
            app.add_api_route(path, self._answer, methods=["POST"])
        routes.attach(app)
        app.state.adapterhub = replica
        app.state.openai_serving_models = type("Serving", (), {"model_config": type("M", (), {"max_model_len": 512})})
        app.state.engine_client = type("Client", (), {"errored": False})
        app.add_middleware(TenancyMiddleware)
        self.app = app
        self.http = httpx.AsyncClient(transport=httpx.ASGITransport(app=app), base_url="http://any.example")

    async def _answer(self, request: Request) -> Any:
        body = await request.json()
        if request.url.path == "/tokenize":
            assert not await request.is_disconnected(), "vLLM would answer nothing"
            text = body.get("prompt") or " ".join(m["content"] for m in body.get("messages", ()))
            return {"count": len(text.split())}
        self.seen.append(body)
        self.headers.append(dict(request.headers))
        await self.gate.wait()
        if self.status != 200:
            return JSONResponse({}, status_code=self.status)
        outputs = self.tokens.ask(stream=bool(body.get("stream")), n=body.get("n") or 1)
        if body.get("stream"):
            return StreamingResponse((b"data: {}\n\n" async for _ in outputs), media_type="text/event-stream")
        answering = asyncio.create_task(_last(outputs))
        leaving = asyncio.create_task(_disconnect(request))  # as vLLM does, which waits for neither
        done, pending = await asyncio.wait({answering, leaving}, return_when=asyncio.FIRST_COMPLETED)
        for task in pending:
            task.cancel()
        return {"model": body["model"], "answer": answering.result()} if answering in done else None

    async def key(self, tenant: str, **options: Any) -> dict[str, str]:
        """The headers of a new key, known to the server."""
        minted, _ = self.tenants.add_key(tenant, **options)
        await self.replica.access.look()
        return {"authorization": f"Bearer {minted.text}"}

    async def limited(self, **limits: int) -> dict[str, str]:
        """Of a tenant with these limits."""
        self.tenants.change(Tenant("acme", limits=Limits(**limits)))
        return await self.key("acme")

    async def chat(self, headers: dict[str, str], model: str = "base", **body: Any) -> httpx.Response:
        return await self.http.post(CHAT, json={"model": model, "messages": HELLO} | body, headers=headers)


async def _last(outputs: Any) -> int:
    return len([output.outputs async for output in outputs])


async def _disconnect(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass


@pytest.fixture
async def server(
    config: ServeConfig, registry: Registry, base: BaseModel, engine: Any, token_engine: Any, tmp_path: Path
) -> AsyncIterator[Server]:
    """Tenants acme and globex; nobody has a key yet."""
    database = open_database(default_url(tmp_path / "home"))
    tenants = Tenants(database)
    for name in ("acme", "globex"):
        tenants.add(Tenant(name))

    async def read() -> Directory | None:
        return tenants.changed()

    metering = Metering(Ledger(database), tmp_path / "spool", keyed=True)
    metrics = CollectorRegistry()
    telemetry = Telemetry(Metrics(metrics), metering)
    replica = Replica(config, registry=registry, base=base, engine=engine, access=Access(read), telemetry=telemetry)
    replica.not_ready = ""
    gauges.connect(replica)
    yield Server(replica, tenants, token_engine, metrics)
    await telemetry.close()


class TestTheDoor:
    async def test_without_a_good_key_nothing_is_answered(self, server: Server) -> None:
        good = await server.key("acme")
        revoked, expired = await server.key("acme"), await server.key("acme")
        server.tenants.revoke(revoked["authorization"].split("_")[1])
        server.tenants.expire(expired["authorization"].split("_")[1], datetime.now(UTC) - timedelta(seconds=1))
        await server.replica.access.look()
        wrong = {"authorization": good["authorization"][:-3] + "abc"}
        for headers in ({}, wrong, revoked, expired, {"authorization": "Basic eA=="}, {"x-api-key": "x"}):
            for method, path in (("POST", CHAT), ("GET", "/v1/models"), ("GET", "/adapterhub/state")):
                answer = await server.http.request(method, path, headers=headers, json={"model": "base"})
                assert answer.status_code == 401, (headers, path)
                assert answer.headers["www-authenticate"] == "Bearer"
        assert not server.seen
        assert (await server.chat(good)).status_code == 200
        assert (await server.http.get("/ready")).status_code == 200

    async def test_both_clients_ways_to_send_a_key_and_none_reaches_the_engine(self, server: Server) -> None:
        text = (await server.key("acme"))["authorization"].split(" ")[1]
        for headers in ({"x-api-key": text}, {"Authorization": f"bearer {text}"}):
            answer = await server.http.post("/v1/messages", json={"model": "base", "messages": HELLO}, headers=headers)
            assert answer.status_code == 200
        assert text not in str(server.headers)
        refused = await server.http.post("/v1/messages", json={"model": "base"}, headers={"x-api-key": "no"})
        assert refused.json()["error"]["type"] == "authentication_error"

    async def test_scopes(self, server: Server) -> None:
        inference, admin = await server.key("acme"), await server.key("acme", scopes={"admin"})
        assert (await server.http.get("/adapterhub/state", headers=inference)).status_code == 403
        assert (await server.http.get("/adapterhub/state", headers=admin)).status_code == 200
        assert (await server.chat(admin)).status_code == 403

    async def test_a_database_that_went_away_closes_the_door_after_a_while(
        self, server: Server, tmp_path: Path
    ) -> None:
        seconds = [0.0]
        server.replica.access = Access(server.replica.access._read, bound=300, clock=lambda: seconds[0])
        key = await server.key("acme")
        for file in (tmp_path / "home").iterdir():
            file.unlink()
        seconds[0] = 299
        assert (await server.chat(key)).status_code == 200
        seconds[0] = 301
        answer = await server.chat(key)
        assert answer.status_code == 503 and "home" not in answer.text

    async def test_no_key_is_ever_logged(self, server: Server, caplog: pytest.LogCaptureFixture) -> None:
        key = await server.key("acme")
        await server.chat(key)
        await server.chat({"authorization": key["authorization"] + "x"})
        server.replica.access = Access(server.replica.access._read, bound=-1)
        await server.replica.access.look()
        await server.chat(key)
        assert caplog.text and key["authorization"].rsplit("_", 1)[1] not in caplog.text


class TestIsolation:
    """`benchmarks/isolation.py` does this a thousand times on the real engine."""

    async def test_what_is_anothers_does_not_exist(
        self, server: Server, publish: Callable[..., Record], registry: Registry
    ) -> None:
        record = publish("globex/desk", channel="prod")
        publish("globex/shared")
        publish("acme/own")
        server.tenants.share(AdapterName.parse("globex/shared"), "acme")
        key = await server.key("acme")
        bodies = {
            "/v1/completions": {"prompt": "x"}, CHAT: {"messages": HELLO}, "/v1/messages": {"messages": HELLO},
            "/v1/responses": {"input": "x"}, "/v1/embeddings": {"input": "x"}, "/tokenize": {"prompt": "x"},
            "/detokenize": {"tokens": [1]}, "/v1/messages/count_tokens": {"messages": HELLO},
        }  # fmt: skip
        selectors = ("", "@1", "@9", "@prod", "@latest", f"@{record.digest}")
        tries = [(path, f"@{s}"[1:]) for path in bodies for s in selectors]
        for path, selector in random.Random(0).sample(tries, len(tries)):
            texts = []
            for name in ("globex/desk", "globex/none", "nobodyx/desk"):
                answer = await server.http.post(path, json=bodies[path] | {"model": name + selector}, headers=key)
                assert answer.status_code == 404, (path, name, selector)
                texts.append(answer.text.replace(name, "NAME"))
            assert len(set(texts)) == 1
        assert not server.seen and not server.replica.residency.places.resident
        assert (await server.chat(key, "acme/own")).status_code == 200
        assert (await server.chat(key, "globex/shared@1")).status_code == 200

    async def test_models_are_listed_to_those_who_may_ask_them(
        self, server: Server, publish: Callable[..., Record]
    ) -> None:
        publish("globex/desk")
        publish("globex/shared")
        publish("acme/own")
        server.tenants.share(AdapterName.parse("globex/shared"), "acme")
        server.tenants.change(Tenant("acme", base=False))
        listed = (await server.http.get("/v1/models", headers=await server.key("acme"))).json()["data"]
        assert {m["id"] for m in listed} == {"acme/own", "acme/own@1", "globex/shared", "globex/shared@1"}
        assert (await server.chat(await server.key("acme"), "base")).status_code == 404

    async def test_no_two_tenants_share_a_prefix_cache(self, server: Server) -> None:
        for tenant in ("acme", "globex"):
            await server.chat(await server.key(tenant), cache_salt="same")
        assert len({body["cache_salt"] for body in server.seen}) == 2

    async def test_stored_responses_are_refused_and_not_there(self, server: Server) -> None:
        key = await server.key("acme")
        for body in ({"previous_response_id": "resp_1"}, {"background": True}):
            answer = await server.http.post("/v1/responses", json={"model": "base", "input": "x"} | body, headers=key)
            assert answer.status_code == 400
        for method, path in (("GET", "/v1/responses/resp_1"), ("POST", "/v1/responses/resp_1/cancel")):
            assert (await server.http.request(method, path, headers=key)).status_code == 404


class TestLimits:
    async def test_requests_a_minute(self, server: Server) -> None:
        key = await server.limited(requests_per_minute=3)
        answers = [await server.chat(key) for _ in range(4)]
        assert [a.status_code for a in answers] == [200, 200, 200, 429]
        assert [a.headers["x-ratelimit-remaining-requests"] for a in answers] == ["2", "1", "0", "0"]
        assert {a.headers["x-ratelimit-limit-requests"] for a in answers} == {"3"}
        refused = answers[-1]
        assert 1 <= int(refused.headers["retry-after"]) <= 60
        assert refused.json()["error"]["type"] == "RateLimitError"
        assert (await server.chat(await server.key("globex"))).status_code == 200

    async def test_a_keys_own_limit_is_no_other_keys(self, server: Server) -> None:
        narrow = await server.key("acme", limits=Limits(requests_per_minute=1))
        assert [(await server.chat(narrow)).status_code for _ in range(2)] == [200, 429]
        assert (await server.chat(await server.key("acme"))).status_code == 200

    @pytest.mark.parametrize("stream", [False, True])
    async def test_tokens_are_charged_for_what_they_were(self, server: Server, stream: bool) -> None:
        """42 by the engine's own count, whatever the request asked for, streamed or not."""
        key = await server.limited(tokens_per_minute=100)
        assert (await server.chat(key, stream=stream, max_tokens=50)).status_code == 200
        caller = server.replica.access.caller([(b"authorization", key["authorization"].encode())])
        headers = dict(await server.replica.quota.headers(caller))
        assert headers[b"x-ratelimit-remaining-tokens"] == b"58"

    async def test_tokens_run_out_and_what_failed_costs_nothing(self, server: Server) -> None:
        key = await server.limited(tokens_per_minute=100)
        server.status = 400
        assert [(await server.chat(key, max_tokens=5)).status_code for _ in range(9)] == [400] * 9
        server.status = 200
        statuses = [(await server.chat(key, max_tokens=5)).status_code for _ in range(4)]
        assert statuses == [200, 200, 429, 429]

    async def test_what_is_larger_than_a_minute_passes_an_empty_one(self, server: Server) -> None:
        key = await server.limited(tokens_per_minute=100)
        assert (await server.chat(key, max_tokens=4000)).status_code == 200
        assert (await server.chat(key, max_tokens=4000)).status_code == 429

    async def test_requests_at_once_wait_and_the_queue_is_bounded(self, server: Server, engine: Any) -> None:
        key = await server.limited(concurrency=2, queue=1)
        server.gate.clear()
        running = [asyncio.create_task(server.chat(key)) for _ in range(3)]
        await engine.until(lambda: len(server.seen) == 2 and server.replica.quota._waiting["tenant/acme"] == 1)
        refused = await server.chat(key)
        assert refused.status_code == 429 and "wait" in refused.text
        other = asyncio.create_task(server.chat(await server.key("globex")))
        await engine.until(lambda: len(server.seen) == 3)
        server.gate.set()
        assert {(await task).status_code for task in (*running, other)} == {200}
        assert not server.replica.quota._gates and not +server.replica.quota._waiting

    async def test_the_length_of_answers(self, server: Server) -> None:
        key = await server.limited(output=20)
        assert (await server.chat(key, max_tokens=21)).status_code == 400
        await server.chat(key, max_tokens=20)
        await server.chat(key)
        assert [b.get("max_tokens", b.get("max_completion_tokens")) for b in server.seen] == [20, 20]

    async def test_the_length_of_prompts_with_their_answers(self, server: Server) -> None:
        key = await server.limited(context=10)
        words = [{"role": "user", "content": "one two three four five six seven"}]
        assert (await server.chat(key, messages=words, max_tokens=4)).status_code == 400
        assert (await server.chat(key, messages=words * 2)).status_code == 400
        assert (await server.chat(key, messages=words)).status_code == 200
        assert server.seen[-1]["max_completion_tokens"] == 3
        for path, body in (("/v1/completions", {"prompt": ["a b"] * 2}), ("/v1/responses", {"input": "a b"})):
            asked = {"model": "base"} | body
            assert (await server.http.post(path, json=asked, headers=key)).status_code == 200
        long = {"model": "base", "prompt": [1] * 11}
        assert (await server.http.post("/v1/completions", json=long, headers=key)).status_code == 400

    async def test_adapters_loaded_at_once(self, server: Server, publish: Callable[..., Record], engine: Any) -> None:
        for name in ("acme/a", "acme/b", "globex/c"):
            publish(name)
        acme = await server.limited(adapters=1)
        globex = await server.key("globex")
        assert (await server.chat(globex, "globex/c")).status_code == 200
        server.gate.clear()
        long = asyncio.create_task(server.chat(acme, "acme/a"))
        await engine.until(lambda: len(server.seen) == 2)
        refused = await server.chat(acme, "acme/b")
        assert refused.status_code == 429 and "retry-after" in refused.headers
        server.gate.set()
        await long
        await engine.until(lambda: not server.replica.residency.places.leases("acme/a@1"))
        assert (await server.chat(acme, "acme/b")).status_code == 200
        assert set(engine.held) == {"acme/b@1", "globex/c@1"}


class TestUsage:
    """What the ledger says, against what was asked."""

    @staticmethod
    async def booked(server: Server) -> dict[Line, Counts]:
        assert server.replica.telemetry.metering is not None
        await server.replica.telemetry.metering.flush()
        now = datetime.now(UTC)
        ledger = server.replica.telemetry.metering._ledger
        rows = ledger.rows(since=now - timedelta(hours=2), until=now + timedelta(hours=2))
        found: dict[Line, Counts] = {}
        for _, line, counts in rows:
            found[line] = found.get(line, Counts()) + replace(counts, resident_ms=0)
        return found

    async def test_every_way_to_ask(self, server: Server, publish: Callable[..., Record]) -> None:
        publish("acme/own")
        key = await server.key("acme")
        key_id = key["authorization"].split("_")[1]
        server.tokens.cached = 16
        for body in ({}, {"stream": True}, {"n": 3}, {"stream": True, "n": 3}):
            assert (await server.chat(key, "acme/own", **body)).status_code == 200
        for path, body in (
            ("/v1/completions", {"prompt": "x"}),
            ("/v1/messages", {"messages": HELLO}),
            ("/v1/responses", {"input": "x", "stream": True}),
        ):
            assert (await server.http.post(path, json={"model": "base"} | body, headers=key)).status_code == 200
        await server.http.post("/tokenize", json={"model": "base", "prompt": "x"}, headers=key)
        await server.http.get("/v1/models", headers=key)
        assert await self.booked(server) == {
            Line("acme", key_id, "acme/own", 1): Counts(4, tokens_in=120, tokens_out=96, tokens_cached=64),
            Line("acme", key_id, "base", 0): Counts(3, tokens_in=90, tokens_out=36, tokens_cached=48),
            Line("acme", "", "acme/own", 1): Counts(cold_loads=1),
        }

    async def test_refused_and_failed(self, server: Server) -> None:
        key = await server.limited(requests_per_minute=2)
        server.status = 500
        assert [(await server.chat(key)).status_code for _ in range(3)] == [503, 503, 429]
        assert (await server.chat(key, "globex/desk")).status_code in (404, 429)
        server.status = 400
        other = await server.key("globex")
        assert (await server.chat(other)).status_code == 400
        assert sorted(c.requests for c in (await self.booked(server)).values()) == [1, 2]
        assert all(c == Counts(c.requests, failed=c.requests) for c in (await self.booked(server)).values())

    @pytest.mark.parametrize("stream", [True, False])
    async def test_a_client_that_leaves_pays_for_what_was_made(self, server: Server, engine: Any, stream: bool) -> None:
        key = await server.limited(tokens_per_minute=1000)
        came = asyncio.Event()
        messages = [{"type": "http.request", "body": json.dumps({
            "model": "base", "messages": HELLO, "stream": stream, "max_tokens": 500,
        }).encode(), "more_body": False}]  # fmt: skip

        async def receive() -> dict[str, Any]:
            if messages:
                return messages.pop()
            await came.wait()
            return {"type": "http.disconnect"}

        received = 0

        async def send(message: dict[str, Any]) -> None:
            nonlocal received
            received += message.get("body", b"").count(b"data:")
            if received >= 5:
                came.set()

        server.tokens.long = 10_000
        scope = {
            "type": "http", "asgi": {"version": "3.0", "spec_version": "2.3"}, "http_version": "1.1", "method": "POST",
            "scheme": "http", "path": CHAT, "raw_path": CHAT.encode(), "query_string": b"", "root_path": "",
            "headers": [(k.encode(), v.encode()) for k, v in key.items()] + [(b"content-type", b"application/json")],
            "client": ("127.0.0.1", 1), "server": ("127.0.0.1", 8000),
        }  # fmt: skip
        asking = asyncio.create_task(server.app(scope, receive, send))
        if not stream:
            await engine.until(lambda: server.seen)
            await engine.until(lambda: server.tokens.made > 5)
            came.set()
        await asking
        (counts,) = (await self.booked(server)).values()
        assert (counts.requests, counts.cancelled, counts.failed, counts.tokens_in) == (1, 1, 0, 30)
        assert received <= counts.tokens_out == server.tokens.made
        caller = server.replica.access.caller([(b"authorization", key["authorization"].encode())])
        headers = dict(await server.replica.quota.headers(caller))
        assert int(headers[b"x-ratelimit-remaining-tokens"]) == 1000 - 30 - counts.tokens_out

    async def test_the_numbers_of_prometheus(self, server: Server, publish: Callable[..., Record]) -> None:
        publish("acme/own")
        key = await server.key("acme")
        await server.chat(key, "acme/own", stream=True)
        await server.chat(key, "acme/none")
        await server.chat({})
        value = server.metrics.get_sample_value
        assert value("adapterhub_tokens_total", {"tenant": "acme", "kind": "out"}) == 12
        labels = {"tenant": "acme", "route": CHAT, "outcome": "ok"}
        assert value("adapterhub_requests_total", labels) == 1
        assert value("adapterhub_rejections_total", {"tenant": "acme", "reason": "not_found"}) == 1
        assert value("adapterhub_rejections_total", {"tenant": "", "reason": "unauthorized"}) == 1
        assert value("adapterhub_first_token_seconds_count", {"tenant": "acme"}) == 1
        assert value("adapterhub_inter_token_seconds_count", {"tenant": "acme"}) == 11
        assert value("adapterhub_queue_seconds_count", {"tenant": "acme"}) == 1
        assert value("adapterhub_load_seconds_count", {"tier": "registry"}) == 1
        assert value("adapterhub_resident_adapters") == 1 and value("adapterhub_ready") == 1
        assert value("adapterhub_middleware_seconds_count", {"span": "all"}) == 3
        server.app.add_route("/metrics", lambda request: PlainTextResponse(generate_latest(server.metrics)))
        page = (await server.http.get("/metrics", headers=await server.key("globex"))).text
        assert "acme" not in page
        page = (await server.http.get("/metrics", headers=await server.key("acme"))).text
        assert 'adapterhub_tokens_total{kind="out",tenant="acme"} 12.0' in page


class TestBadInput:
    @pytest.mark.parametrize(
        "body",
        [{"n": 10**9}, {"n": 0}, {"n": -1}, {"n": "2"}, {"n": True}, {"max_tokens": -5}, {"max_tokens": 1.5},
         {"max_completion_tokens": "many"}, {"best_of": 10**6}],
    )  # fmt: skip
    async def test_numbers_that_are_none(self, server: Server, body: dict[str, Any]) -> None:
        assert (await server.chat(await server.key("acme"), **body)).status_code == 400
        assert not server.seen

    async def test_a_body_that_says_it_is_too_large_is_not_read(self, server: Server) -> None:
        key = await server.key("acme")
        answer = await server.http.post(CHAT, content=b"{}", headers=key | {"content-length": str(100 * 2**20)})
        assert answer.status_code == 413

    async def test_headers_of_a_megabyte(self, server: Server) -> None:
        answer = await server.chat(await server.key("acme") | {"x-long": "x" * 2**20})
        assert answer.status_code == 431
        assert not server.seen

    async def test_unknown_fields_pass(self, server: Server) -> None:
        assert (await server.chat(await server.key("acme"), novelty={"a": 1})).status_code == 200
        assert server.seen[-1]["novelty"] == {"a": 1}


class TestAdmin:
    async def test_load_pin_forget(self, server: Server, publish: Callable[..., Record], engine: Any) -> None:
        publish("globex/desk", channel="prod")
        publish("acme/own")
        key = await server.key("acme", scopes={"admin"})

        async def ask(path: str, model: str) -> httpx.Response:
            return await server.http.post(f"/adapterhub/{path}", json={"model": model}, headers=key)

        assert (await ask("load", "globex/desk@prod")).json()["model"] == "globex/desk@1"
        assert (await ask("pin", "acme/own")).status_code == 200
        listed = (await server.http.get("/adapterhub/loaded", headers=key)).json()
        assert [(entry["model"], entry["pinned"]) for entry in listed] == [
            ("globex/desk@1", False),
            ("acme/own@1", True),
        ]
        assert (await ask("forget", "acme/own@1")).status_code == 409
        assert (await ask("unpin", "acme/own@1")).status_code == 200
        assert [e["model"] for e in (await ask("forget", "acme/own@1")).json()] == ["globex/desk@1"]
        assert (await ask("forget", "acme/own@1")).status_code == 404
        assert (await ask("load", "globex/none")).status_code == 404
        assert set(engine.held) == {"globex/desk@1"}

    async def test_a_tenant_moves_its_own_channels_and_no_others(
        self, server: Server, publish: Callable[..., Record], registry: Registry
    ) -> None:
        for name in ("acme/own", "globex/desk"):
            publish(name, channel="prod")
            publish(name)
        key = await server.key("acme", scopes={"channels"})

        async def move(channel: str, version: int) -> int:
            body = {"channel": channel, "version": version}
            return (await server.http.post("/adapterhub/channels", json=body, headers=key)).status_code

        assert await move("acme/own@prod", 2) == 200
        assert registry.channels(AdapterName.parse("acme/own"))["prod"].main.version == 2
        assert await move("globex/desk@prod", 2) == await move("globex/none@prod", 2) == 404
        assert registry.channels(AdapterName.parse("globex/desk"))["prod"].main.version == 1
        assert (await server.http.get("/adapterhub/loaded", headers=key)).status_code == 403

    async def test_a_rollout_of_ones_own_from_start_to_end(
        self, server: Server, publish: Callable[..., Record], registry: Registry
    ) -> None:
        publish("acme/own", channel="prod")
        publish("acme/own")
        publish("globex/desk", channel="prod")
        key = await server.key("acme", scopes={"channels"})

        async def verb(name: str, channel: str = "acme/own@prod", **body: Any) -> httpx.Response:
            path = f"/adapterhub/rollout/{name}"
            return await server.http.post(path, json={"channel": channel} | body, headers=key)

        told = (await verb("start", candidate="2", weight=20, max_error_rate=0.5, why="new tone")).json()
        assert told["ready"] == {"acme/own@1": 80, "acme/own@2": 20}
        assert (told["trial"]["phase"], told["trial"]["gates"]["max_error_rate"]) == ("running", 0.5)
        move = registry.channels(AdapterName.parse("acme/own"))["prod"]
        assert move.why == "new tone" and move.who.startswith("key ")
        assert (await verb("pause")).json()["trial"]["phase"] == "paused"
        assert (await verb("start", candidate="2")).json()["ready"]["acme/own@2"] == 5
        assert (await verb("promote")).json()["ready"] == {"acme/own@2": 100}
        assert (await verb("status")).json()["trial"]["phase"] == "promoted"
        for name in ("status", "start", "abort"):
            body = {"candidate": "1"} if name == "start" else {}
            assert (await verb(name, "globex/desk@prod", **body)).status_code == 404
            assert (await verb(name, "globex/none@prod", **body)).status_code == 404
        for wrong in ({"candidate": "2", "weight": 0}, {"candidate": "2", "weight": 5, "min_score": 7}):
            assert (await verb("start", **wrong)).status_code == 400
        assert (await verb("abort", "acme/own@1")).status_code == 400
        assert (await verb("start")).status_code == 422
        assert (await server.http.post("/adapterhub/rollout/status", json={}, headers={})).status_code == 401

    async def test_it_describes_itself_and_tells_no_password(self, server: Server, config: ServeConfig) -> None:
        key = await server.key("acme", scopes={"admin"})
        described = (await server.http.get("/adapterhub/openapi.json", headers=key)).json()
        assert {"/adapterhub/loaded", "/adapterhub/load", "/adapterhub/pin", "/adapterhub/forget",
                "/adapterhub/config", "/adapterhub/channels", "/adapterhub/rollout/status", "/adapterhub/rollout/start",
                "/adapterhub/rollout/abort"} <= set(described["paths"])  # fmt: skip
        secret = replace(config, database="postgresql://ana:secret@db/ah", redis="redis://:secret@r/0")
        server.replica.config = secret
        answer = await server.http.get("/adapterhub/config", headers=key)
        assert answer.json()["max_loras"] == 2 and "secret" not in answer.text


class TestWhatTheEngineSays:
    async def test_its_failures_are_not_told(self, server: Server) -> None:
        server.status = 500
        answer = await server.chat(await server.key("acme"))
        assert answer.status_code == 503
        assert "usage" not in answer.text and answer.headers["x-request-id"] in answer.text

    async def test_nor_are_bugs_of_our_own(
        self, server: Server, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
    ) -> None:
        async def broken(*_: object) -> None:
            raise RuntimeError("/secret/path")

        monkeypatch.setattr(server.replica.quota, "count_request", broken)
        answer = await server.chat(await server.key("acme"))
        assert answer.status_code == 500 and "secret" not in answer.text
        assert "/secret/path" in caplog.text

    async def test_a_tenant_sees_its_own_metrics_alone(self, server: Server) -> None:
        page = "\n".join(
            [
                "# HELP vllm:lora_requests_info x",
                "# TYPE vllm:lora_requests_info gauge",
                'vllm:lora_requests_info{running_lora_adapters="globex/desk@1"} 1.0',
                "# TYPE adapterhub_tokens_total counter",
                'adapterhub_tokens_total{adapter="acme/own",tenant="acme"} 7.0',
                'adapterhub_tokens_total{adapter="acme2",tenant="acme2"} 7.0',
                'adapterhub_tokens_total{adapter="x\\",tenant=\\"acme\\"",tenant="globex"} 9.0',
            ]
        )
        server.app.add_route("/metrics", lambda request: PlainTextResponse(page))
        own = (await server.http.get("/metrics", headers=await server.key("acme"))).text
        assert own.splitlines() == [
            "# TYPE adapterhub_tokens_total counter",
            'adapterhub_tokens_total{adapter="acme/own",tenant="acme"} 7.0',
        ]
        assert (await server.http.get("/metrics", headers=await server.key("acme", scopes={"admin"}))).text == page
        assert (await server.http.get("/metrics")).status_code == 401
