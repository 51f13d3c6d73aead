"""The way of a request, through a real ASGI application that stands where vLLM's would be."""

from __future__ import annotations

import asyncio
import contextlib
import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import httpx
import pytest
from safetensors.numpy import load_file, save_file
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, StreamingResponse
from starlette.routing import Route

from adapterhub.base import BaseModel, find_base
from adapterhub.errors import AdapterHubError, IntegrityError
from adapterhub.manifest import Record
from adapterhub.refs import AdapterName, AdapterRef
from adapterhub.registry import Registry
from adapterhub.registry.cache import Cache
from adapterhub.registry.signing import sign
from adapterhub.registry.views import rollouts
from adapterhub.serving import routes, tenancy
from adapterhub.serving.admission.admission import Admission
from adapterhub.serving.admission.fairness import Window
from adapterhub.serving.config import ServeConfig
from adapterhub.serving.middleware import TenancyMiddleware
from adapterhub.serving.replica import Replica
from adapterhub.serving.tenants.callers import SINGLE_USER

pytestmark = pytest.mark.anyio

Publish = Callable[..., Record]
CHAT = "/v1/chat/completions"
HELLO = [{"role": "user", "content": "hi"}]


class Inner:
    """What would be vLLM: remembers what it was sent, streams one piece each time it is told to."""

    def __init__(self, engine: Any) -> None:
        self.engine = engine
        self.seen: list[dict[str, Any]] = []
        self.headers: list[dict[str, str]] = []
        self.more = asyncio.Semaphore(0)
        self.broken = ""  # a model that is answered with 500
        paths = [CHAT, "/v1/completions", "/v1/messages", "/tokenize", "/v1/load_lora_adapter", "/invocations"]
        self.app = Starlette(routes=[Route(path, self.answer, methods=["POST"]) for path in paths])
        self.app.add_route("/health", lambda request: JSONResponse({}))
        self.app.add_route("/metrics", lambda request: JSONResponse({}))

    async def answer(self, request: Request) -> Any:
        body = await request.json()
        self.seen.append(body)
        self.headers.append(dict(request.headers))
        model = body["model"]
        assert model == "base" or model in self.engine.held, "vLLM would answer 404"
        if model == self.broken:
            return JSONResponse({}, status_code=500)
        if not body.get("stream"):
            return JSONResponse({"model": model}, headers={"x-request-id": "of the engine"})

        async def pieces() -> Any:
            for _ in range(3):
                await self.more.acquire()
                assert model in self.engine.held, "forgotten while it was streaming"
                yield f'data: {{"model": "{model}"}}\n\n'

        return StreamingResponse(pieces(), media_type="text/event-stream")


@pytest.fixture
def inner(engine: Any, replica: Replica) -> Inner:
    inner = Inner(engine)
    inner.app.state.adapterhub = replica
    inner.app.add_middleware(TenancyMiddleware)
    return inner


@pytest.fixture
def client(inner: Inner) -> httpx.AsyncClient:
    return httpx.AsyncClient(transport=httpx.ASGITransport(app=inner.app), base_url="http://localhost:8000")


async def chat(client: httpx.AsyncClient, model: object = "acme/support", **body: Any) -> httpx.Response:
    return await client.post(CHAT, json={"model": model, "messages": HELLO} | body)


async def test_what_nobody_signed_is_refused_and_says_so(
    config: ServeConfig, registry: Registry, engine: Any, publish: Publish, keys: dict[str, tuple[Path, Path]]
) -> None:
    config = replace(config, require_signed_by=(keys["ana"][1],))
    replica = Replica(config, registry=registry, base=find_base(str(config.base)), engine=engine)
    replica.not_ready = ""
    inner = Inner(engine)
    inner.app.state.adapterhub = replica
    inner.app.add_middleware(TenancyMiddleware)
    record = publish()
    async with httpx.AsyncClient(transport=httpx.ASGITransport(app=inner.app), base_url="http://localhost") as client:
        refused = await chat(client)
        assert refused.status_code == 422
        assert "is not signed with a key that is required here: nobody signed it" in refused.json()["error"]["message"]
        assert str(keys["ana"][1]) not in refused.text
        sign(registry, record, key=keys["ana"][0])
        assert (await chat(client)).status_code == 200


class Exchange:
    """One request, driven by hand: httpx's transport hands out a stream only when it is over."""

    def __init__(self, app: Any, body: dict[str, Any]) -> None:
        self.messages: list[dict[str, Any]] = []
        self._incoming: asyncio.Queue[dict[str, Any]] = asyncio.Queue()
        self._incoming.put_nowait({"type": "http.request", "body": json.dumps(body).encode(), "more_body": False})
        scope = {
            "type": "http", "asgi": {"version": "3.0"}, "http_version": "1.1", "method": "POST", "scheme": "http",
            "path": CHAT, "raw_path": CHAT.encode(), "query_string": b"", "root_path": "",
            "headers": [(b"host", b"localhost"), (b"content-type", b"application/json")],
            "client": ("127.0.0.1", 1), "server": ("127.0.0.1", 8000),
        }  # fmt: skip
        self.task = asyncio.create_task(app(scope, self._incoming.get, self._send))

    async def _send(self, message: dict[str, Any]) -> None:
        self.messages.append(message)

    def leave(self) -> None:
        self._incoming.put_nowait({"type": "http.disconnect"})

    @property
    def headers(self) -> dict[str, str]:
        return {k.decode(): v.decode() for k, v in self.messages[0]["headers"]}

    @property
    def pieces(self) -> list[bytes]:
        return [m["body"] for m in self.messages[1:] if m.get("body")]


class TestTheWayIn:
    async def test_the_engine_gets_the_immutable_name_and_the_client_is_told(
        self, client: httpx.AsyncClient, inner: Inner, publish: Publish
    ) -> None:
        record = publish(channel="prod")
        for model in ("acme/support", "acme/support@prod", "acme/support@1", f"acme/support@{record.digest}"):
            answer = await chat(client, model, temperature=0)
            assert answer.status_code == 200
            assert answer.json()["model"] == "acme/support@1"
            assert answer.headers["x-adapterhub-version"] == "acme/support@1"
            assert answer.headers["x-adapterhub-digest"] == record.digest
            assert inner.seen[-1]["temperature"] == 0
            assert inner.seen[-1]["cache_salt"] == SINGLE_USER.salt(None)
            assert "x-adapterhub-deprecated" not in answer.headers

    async def test_the_base_has_no_digest(self, client: httpx.AsyncClient, engine: Any) -> None:
        answer = await chat(client, "base")
        assert answer.json()["model"] == answer.headers["x-adapterhub-version"] == "base"
        assert "x-adapterhub-digest" not in answer.headers
        assert not engine.loads

    async def test_one_request_id_on_both_sides(self, client: httpx.AsyncClient, inner: Inner) -> None:
        answer = await client.post(CHAT, json={"model": "base"}, headers={"X-Request-Id": "trace-7"})
        assert answer.headers.get_list("x-request-id") == [inner.headers[-1]["x-request-id"]] == ["trace-7"]
        answer = await client.post(CHAT, json={"model": "base"}, headers={"X-Request-Id": "no good\t"})
        assert answer.headers["x-request-id"] == inner.headers[-1]["x-request-id"] != "no good\t"

    async def test_a_deprecated_version_answers_with_a_warning(
        self, client: httpx.AsyncClient, publish: Publish, registry: Registry
    ) -> None:
        publish()
        registry.set_status(AdapterName.parse("acme/support"), 1, "deprecated", who="t", why="use 2\r\nset-cookie: ü")
        answer = await chat(client, "acme/support@1")
        assert answer.headers["x-adapterhub-deprecated"] == "use 2??set-cookie: ?"

    async def test_an_adapters_own_template_and_only_a_different_one(
        self, client: httpx.AsyncClient, inner: Inner, publish: Publish, tiny_base: Path
    ) -> None:
        publish("acme/same", files={"chat_template.jinja": (tiny_base / "chat_template.jinja").read_text()})
        publish("acme/own", files={"chat_template.jinja": "{{ messages[0].content }}"})
        await chat(client, "acme/same")
        assert "chat_template" not in inner.seen[-1]
        await chat(client, "acme/own")
        assert inner.seen[-1]["chat_template"] == "{{ messages[0].content }}"
        await client.post("/v1/messages", json={"model": "acme/own", "messages": HELLO})
        assert inner.seen[-1]["chat_template_kwargs"] == {"chat_template": "{{ messages[0].content }}"}

    async def test_an_adapters_own_end_stops_it(
        self, client: httpx.AsyncClient, inner: Inner, publish: Publish
    ) -> None:
        publish("acme/ends", files={"generation_config.json": '{"eos_token_id": [258, 259]}'})
        publish("acme/broken", files={"generation_config.json": "{"})
        await chat(client, "acme/ends")
        assert inner.seen[-1]["stop_token_ids"] == [258, 259]
        assert (await chat(client, "acme/broken")).status_code == 503


class TestTrial:
    @pytest.fixture(autouse=True)
    def shared(self, publish: Publish, registry: Registry) -> None:
        """``prod``: half of the callers get version 2."""
        publish(channel="prod")
        publish()
        name = AdapterName.parse("acme/support")
        rollouts.start(
            registry, name=name, channel="prod", candidate=2, weight=50, gates={"min_requests": 5}, who="tests"
        )

    async def test_a_caller_keeps_its_version_and_the_headers_say_which(self, client: httpx.AsyncClient) -> None:
        async def versions() -> list[str]:
            return [
                (await chat(client, "acme/support@prod", user=f"user-{n}")).headers["x-adapterhub-version"]
                for n in range(20)
            ]

        first = await versions()
        assert set(first) == {"acme/support@1", "acme/support@2"}
        assert await versions() == first

    async def test_a_candidate_that_fails_is_taken_away_by_itself(
        self, client: httpx.AsyncClient, inner: Inner, registry: Registry, replica: Replica
    ) -> None:
        inner.broken = "acme/support@2"
        for n in range(40):
            await chat(client, "acme/support@prod", user=f"user-{n}")
        await replica.trials.settle()
        move = registry.channels(AdapterName.parse("acme/support"))["prod"]
        assert (move.kind, move.main.version) == ("rollback", 1)
        after = [await chat(client, "acme/support@prod", user=f"user-{n}") for n in range(20)]
        assert {answer.status_code for answer in after} == {200}

    async def test_one_that_cannot_be_loaded_too(
        self, client: httpx.AsyncClient, engine: Any, registry: Registry, replica: Replica
    ) -> None:
        engine.refused = "acme/support@2"
        answers = [await chat(client, "acme/support@prod", user=f"user-{n}") for n in range(40)]
        await replica.trials.settle()
        assert registry.channels(AdapterName.parse("acme/support"))["prod"].kind == "rollback"
        assert 400 <= next(a.status_code for a in answers if a.status_code != 200) < 500


class TestFaults:
    async def test_an_adapter_that_the_engine_refuses_is_its_callers_matter(
        self, client: httpx.AsyncClient, publish: Publish, engine: Any
    ) -> None:
        publish("acme/good")
        publish("acme/broken")
        engine.refused = "acme/broken@1"
        answers = await asyncio.gather(*(chat(client, m) for _ in range(10) for m in ("acme/good", "acme/broken")))
        assert [answer.status_code for answer in answers] == [200, 400] * 10
        assert "acme/broken@1 cannot be loaded" in answers[1].text
        assert engine.loads.count("acme/broken@1") == 1, "everybody's loads wait for each"

    async def test_the_cache_stays_within_its_limit_and_nothing_in_use_goes(
        self, config: ServeConfig, registry: Registry, base: BaseModel, engine: Any, publish: Publish
    ) -> None:
        """Three places in the engine, four adapters, a limit of one: what is loaded keeps its copy."""
        replica = Replica(replace(config, cache_limit=1), registry=registry, base=base, engine=engine)
        trim = Cache.trim
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(Cache, "trim", lambda *a, **k: trim(*a, **k, unused_seconds=0))
            for letter in "abcd":
                await replica.ensure(publish(f"acme/{letter}"))
            await replica.ensure(publish("acme/e"))
        copies = {path.name for path in (config.cache / "sha256").iterdir()}
        assert copies == {path.name for path in engine.held.values()}

    async def test_a_registry_of_garbage(
        self, client: httpx.AsyncClient, publish: Publish, registry: Any, replica: Replica
    ) -> None:
        publish(channel="prod")
        publish("acme/other")
        assert (await chat(client, "acme/support@prod")).status_code == 200
        values = registry.store._values
        for key in values:
            values[key] = b'{"half": '
        with contextlib.suppress(AdapterHubError):
            await replica.poll()
        assert (await chat(client, "acme/support@prod")).status_code == 200
        answer = await chat(client, "acme/other")
        assert answer.status_code == 503
        assert "half" not in answer.text and "memory://" not in answer.text


class TestRefusals:
    async def test_what_a_name_cannot_mean(
        self, client: httpx.AsyncClient, publish: Publish, registry: Registry, inner: Inner
    ) -> None:
        publish()
        publish()
        registry.set_status(AdapterName.parse("acme/support"), 2, "yanked", who="t", why="leaks prices")
        asked = {
            "acme/nope": 404, "nobody/support": 404, "acme/support@9": 404, "acme/support@prod": 404,
            "acme/support@2": 410, "../x": 400, "": 400, "ACME/support": 400,
        }  # fmt: skip
        for model, status in asked.items():
            answer = await chat(client, model)
            error = answer.json()["error"]
            assert (answer.status_code, error["code"]) == (status, status), model
            assert error["message"] and "memory://" not in answer.text and str(Path.home()) not in answer.text
        assert "leaks prices" in (await chat(client, "acme/support@2")).text
        assert not inner.seen

    async def test_forbidden_and_absent_look_the_same(self, client: httpx.AsyncClient, publish: Publish) -> None:
        publish()
        texts = [(await chat(client, m)).text for m in ("acme/support@9", "nobody/support@9")]
        assert texts[0].replace("acme", "nobody") == texts[1]

    async def test_routes_of_the_engine_are_not_there(self, client: httpx.AsyncClient, inner: Inner) -> None:
        for method, path in (("POST", "/v1/load_lora_adapter"), ("POST", "/invocations"), ("GET", "/metrics/")):
            answer = await client.request(method, path, json={"model": "base"})
            assert answer.status_code == 404
        assert not inner.seen

    async def test_broken_bodies(self, client: httpx.AsyncClient, inner: Inner) -> None:
        for raw in (b"", b"{", b"[1]", b"\xff", b'{"model": 3}', b'{"model": null}', b"[" * 200_000):
            answer = await client.post(CHAT, content=raw, headers={"content-type": "application/json"})
            assert answer.status_code == 400, raw[:20]
            assert answer.json()["error"]["type"] == "BadRequestError"
        assert not inner.seen

    async def test_nothing_is_loaded_for_a_request_that_is_refused(
        self, client: httpx.AsyncClient, publish: Publish, engine: Any
    ) -> None:
        publish()
        assert (await chat(client, priority=-5)).status_code == 400
        assert not engine.loads

    async def test_a_huge_body_is_cut_off(self, client: httpx.AsyncClient, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(tenancy, "MAX_BODY", 1000)
        answer = await chat(client, "base", padding="x" * 1000)
        assert answer.status_code == 413

    async def test_a_page_of_another_site_cannot_reach_it(self, client: httpx.AsyncClient, inner: Inner) -> None:
        for header in ({"host": "evil.example"}, {"origin": "https://evil.example"}):
            answer = await client.post(CHAT, json={"model": "base"}, headers=header)
            assert answer.status_code == 400
        assert not inner.seen

    async def test_a_rank_over_the_servers_names_the_flag(self, client: httpx.AsyncClient, publish: Publish) -> None:
        publish(rank=32)
        answer = await chat(client)
        assert answer.status_code == 422
        assert "--max-lora-rank 16" in answer.text

    async def test_another_base_is_refused(
        self, client: httpx.AsyncClient, publish: Publish, tiny_base: Path, tmp_path: Path
    ) -> None:
        other = shutil.copytree(tiny_base, tmp_path / "another")
        tensors = load_file(other / "model.safetensors")
        save_file({name: -tensor for name, tensor in tensors.items()}, other / "model.safetensors")
        publish(trained_on=find_base(str(other)))
        answer = await chat(client)
        assert answer.status_code == 422
        assert "another base" in answer.text

    async def test_what_breaks_here_is_not_told_there(
        self, client: httpx.AsyncClient, publish: Publish, engine: Any, caplog: pytest.LogCaptureFixture
    ) -> None:
        publish()
        engine.failure = IntegrityError("/secret/path is not what was published")
        answer = await chat(client)
        assert answer.status_code == 500
        assert "secret" not in answer.text
        assert answer.headers["x-request-id"] in answer.json()["error"]["message"]
        assert "/secret/path" in caplog.text

    async def test_before_it_is_ready_only_health_is_answered(
        self, client: httpx.AsyncClient, replica: Replica
    ) -> None:
        replica.not_ready = "it is starting"
        assert (await chat(client, "base")).status_code == 503
        assert (await client.get("/v1/models")).status_code == 503
        assert (await client.get("/health")).status_code == 200

    async def test_without_the_plug_in_nothing_is_answered(self, inner: Inner, client: httpx.AsyncClient) -> None:
        del inner.app.state.adapterhub
        for answer in (await chat(client, "base"), await client.get("/health")):
            assert answer.status_code == 503

    async def test_websockets_are_closed(self, inner: Inner) -> None:
        sent: list[dict[str, Any]] = []

        async def send(message: dict[str, Any]) -> None:
            sent.append(message)

        await inner.app({"type": "websocket", "path": "/v1/realtime", "headers": []}, asyncio.Queue().get, send)
        assert [m["type"] for m in sent] == ["websocket.close"]


class TestStreams:
    async def test_a_stream_ends_on_its_version_and_the_next_starts_on_the_new_one(
        self, inner: Inner, client: httpx.AsyncClient, replica: Replica, publish: Publish, engine: Any
    ) -> None:
        publish()
        stream = Exchange(inner.app, {"model": "acme/support", "stream": True})
        inner.more.release()
        await engine.until(lambda: stream.pieces)
        publish()
        await replica.poll()
        assert (await chat(client)).json()["model"] == "acme/support@2"
        inner.more.release()
        inner.more.release()
        await stream.task
        assert stream.headers["x-adapterhub-version"] == "acme/support@1"
        assert stream.pieces == [b'data: {"model": "acme/support@1"}\n\n'] * 3

    async def test_pieces_go_through_one_by_one_as_they_come(self, inner: Inner, publish: Publish, engine: Any) -> None:
        publish()
        stream = Exchange(inner.app, {"model": "acme/support", "stream": True})
        for count in (1, 2, 3):
            inner.more.release()
            await engine.until(lambda count=count: len(stream.pieces) == count)
        await stream.task

    async def test_an_adapter_is_not_forgotten_before_the_last_byte(
        self, inner: Inner, client: httpx.AsyncClient, publish: Publish, engine: Any
    ) -> None:
        """Four adapters on three places, one of them streaming all the while."""
        for name in ("acme/long", "acme/b", "acme/c", "acme/d"):
            publish(name)
        stream = Exchange(inner.app, {"model": "acme/long", "stream": True})
        inner.more.release()
        await engine.until(lambda: stream.pieces)
        for name in ("acme/b", "acme/c", "acme/d", "acme/b", "acme/c"):
            assert (await chat(client, name)).status_code == 200
        assert "acme/long@1" in engine.held
        inner.more.release()
        inner.more.release()
        await stream.task
        assert len(stream.pieces) == 3

    async def test_a_client_that_leaves_gives_its_lease_back(
        self, inner: Inner, replica: Replica, publish: Publish, engine: Any
    ) -> None:
        publish()
        stream = Exchange(inner.app, {"model": "acme/support", "stream": True})
        inner.more.release()
        await engine.until(lambda: stream.pieces)
        assert replica.residency.places.leases("acme/support@1") == 1
        stream.leave()
        await stream.task
        await engine.until(lambda: replica.residency.places.leases("acme/support@1") == 0)

    async def test_a_client_that_leaves_before_its_body_is_no_request(self, inner: Inner) -> None:
        exchange = Exchange(inner.app, {})
        exchange._incoming.get_nowait()
        exchange.leave()
        await exchange.task
        assert not exchange.messages and not inner.seen


class TestTheCacheOnDisk:
    async def test_a_deleted_cache_harms_nobody(
        self, client: httpx.AsyncClient, replica: Replica, publish: Publish, engine: Any
    ) -> None:
        for name in ("acme/a", "acme/b"):
            publish(name)
        assert (await chat(client, "acme/a")).status_code == 200
        shutil.rmtree(replica.config.cache)
        assert (await chat(client, "acme/a")).status_code == 200
        assert engine.loads == ["acme/a@1"]
        assert (await chat(client, "acme/b")).status_code == 200
        shutil.rmtree(replica.config.cache)
        publish("acme/a")
        await replica.poll()
        assert (await chat(client, "acme/a")).json()["model"] == "acme/a@2"

    async def test_many_requests_for_a_cold_adapter_share_one_load(
        self, client: httpx.AsyncClient, publish: Publish, engine: Any
    ) -> None:
        publish()
        answers = await asyncio.gather(*(chat(client) for _ in range(16)))
        assert {a.status_code for a in answers} == {200}
        assert engine.loads == ["acme/support@1"]


class TestOurRoutes:
    @pytest.fixture
    def client(self, engine: Any, replica: Replica) -> httpx.AsyncClient:
        from fastapi import FastAPI

        app = FastAPI()
        routes.attach(app)
        app.state.adapterhub = replica
        app.state.openai_serving_models = Serving()
        app.add_middleware(TenancyMiddleware)
        return httpx.AsyncClient(transport=httpx.ASGITransport(app=app), base_url="http://localhost:8000")

    async def test_models_are_what_can_be_asked_for(
        self, client: httpx.AsyncClient, publish: Publish, registry: Registry, replica: Replica
    ) -> None:
        publish(channel="prod")
        publish()
        publish()
        registry.set_status(AdapterName.parse("acme/support"), 3, "yanked", who="t")
        publish("globex/wide", rank=64)
        answer = await client.get("/v1/models")
        listed = {m["id"]: m["root"] for m in answer.json()["data"]}
        assert listed == {
            "base": "base",
            "acme/support": "acme/support@2",
            "acme/support@prod": "acme/support@1",
            "acme/support@2": "acme/support@2",
            "acme/support@1": "acme/support@1",
        }
        assert str(replica.config.cache) not in answer.text

    async def test_poll_makes_a_move_immediate_and_state_shows_it(
        self, client: httpx.AsyncClient, publish: Publish, registry: Registry, replica: Replica
    ) -> None:
        from adapterhub.refs import AdapterRef

        publish(channel="prod")
        publish()
        await replica.rollout.current(AdapterRef.parse("acme/support@prod"))
        registry.set_channel(AdapterName.parse("acme/support"), "prod", {2: 100}, who="t")
        before = (await client.get("/adapterhub/state")).json()["references"]
        after = (await client.post("/adapterhub/poll")).json()["references"]
        assert [r["ready"] for r in before + after] == ["acme/support@1", "acme/support@2"]
        assert (await client.get("/adapterhub/state")).json()["resident"] == [{"model": "acme/support@2", "leases": 0}]

    async def test_ready_says_why_not(self, client: httpx.AsyncClient, replica: Replica) -> None:
        assert (await client.get("/ready")).json() == {"ready": True, "reason": None}
        replica.not_ready = "it is starting"
        answer = await client.get("/ready")
        assert (answer.status_code, answer.json()["reason"]) == (503, "it is starting")

    async def test_a_watcher_that_ends_takes_readiness_with_it(
        self, client: httpx.AsyncClient, replica: Replica, engine: Any, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        async def broken(**_: float) -> None:
            raise RuntimeError("a bug")

        monkeypatch.setattr(replica.rollout, "watch", broken)
        replica.watch()
        await engine.until(lambda: replica.not_ready)
        assert (await client.get("/ready")).status_code == 503

    async def test_ready_ends_with_the_engine(self, client: httpx.AsyncClient, engine: Any) -> None:
        engine.is_dead = True
        assert (await client.get("/ready")).status_code == 503
        answer = await chat(client, "base")
        assert answer.status_code == 503
        assert (answer.headers["retry-after"], answer.headers["connection"]) == ("5", "close")
        assert "its engine ended" in answer.json()["error"]["message"]


class Serving:
    """vLLM's OpenAIServingModels, as far as ``/v1/models`` asks it."""

    class model_config:  # noqa: N801 - vLLM's name
        max_model_len = 512


class TestTheTurn:
    @pytest.fixture
    def narrow(self, replica: Replica) -> None:
        """An engine of one sequence."""
        replica.admission = Admission(Window(sequences=1, slots=2))

    @pytest.mark.usefixtures("narrow")
    async def test_a_request_waits_until_the_one_before_has_its_last_byte(
        self, inner: Inner, publish: Publish, engine: Any
    ) -> None:
        publish()
        body = {"model": "acme/support", "messages": HELLO, "stream": True}
        first, second = Exchange(inner.app, body), Exchange(inner.app, body)
        await engine.until(lambda: inner.seen)
        for _ in range(3):
            assert len(inner.seen) == 1
            inner.more.release()
        await first.task
        for _ in range(3):
            inner.more.release()
        await second.task
        assert len(second.pieces) == 3

    @pytest.mark.usefixtures("narrow")
    async def test_a_client_that_leaves_the_line_never_reaches_the_engine(
        self, inner: Inner, publish: Publish, replica: Replica, engine: Any
    ) -> None:
        publish()
        body = {"model": "acme/support", "messages": HELLO, "stream": True}
        first = Exchange(inner.app, body)
        await engine.until(lambda: inner.seen)
        second = Exchange(inner.app, body)
        await engine.until(lambda: replica.admission.line.waiting("acme"))
        second.leave()
        await second.task
        assert second.messages == []
        assert replica.admission.line.waiting("acme") == 0
        for _ in range(3):
            inner.more.release()
        await first.task
        assert len(inner.seen) == 1
        assert replica.admission.line.running == 0


async def test_a_load_that_takes_too_long_goes_on_and_says_when_to_come_again(
    client: httpx.AsyncClient, replica: Replica, publish: Publish, engine: Any
) -> None:
    publish()
    await replica.rollout.deployment(AdapterRef.parse("acme/support"))  # what is looked up has as long as a load
    replica.config = replace(replica.config, load_seconds=0.01)
    engine.gate.clear()
    answer = await chat(client)
    assert answer.status_code == 503
    assert "acme/support@1 is being loaded" in answer.json()["error"]["message"]
    assert answer.headers["retry-after"] == "5"
    engine.gate.set()
    await engine.until(lambda: replica.residency.places.is_resident("acme/support@1"))
    assert (await chat(client)).status_code == 200
    assert engine.loads == ["acme/support@1"]
