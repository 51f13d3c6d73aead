"""What breaks around a server: its registry, its cache, the clock. Who has what they need does not notice."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import httpx
import pytest
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse

from adapterhub.base import BaseModel
from adapterhub.errors import StorageError, TooManyRequests
from adapterhub.manifest import Record
from adapterhub.registry import Registry
from adapterhub.serving.config import ServeConfig
from adapterhub.serving.middleware import TenancyMiddleware
from adapterhub.serving.replica import Replica
from adapterhub.serving.tenants.callers import Caller, Limits
from adapterhub.serving.tenants.quota import Quota

pytestmark = pytest.mark.anyio

Publish = Callable[..., Record]
CHAT = "/v1/chat/completions"


@pytest.fixture
def replica(config: ServeConfig, registry: Registry, base: BaseModel, engine: Any) -> Replica:
    """It waits a moment for what does not come."""
    made = Replica(replace(config, load_seconds=0.2), registry=registry, base=base, engine=engine)
    made.not_ready = ""
    return made


@pytest.fixture
def client(replica: Replica) -> httpx.AsyncClient:
    async def answer(request: Request) -> JSONResponse:
        return JSONResponse({"model": (await request.json())["model"]})

    app = Starlette()
    app.add_route(CHAT, answer, methods=["POST"])
    app.state.adapterhub = replica
    app.add_middleware(TenancyMiddleware)
    return httpx.AsyncClient(transport=httpx.ASGITransport(app=app), base_url="http://localhost:8000")


async def ask(client: httpx.AsyncClient, model: str) -> httpx.Response:
    return await client.post(CHAT, json={"model": model, "messages": []})


class TestTheRegistry:
    @pytest.fixture(params=["gone", "hangs"])
    def broken(
        self, request: pytest.FixtureRequest, registry: Registry
    ) -> Iterator[Callable[[pytest.MonkeyPatch], None]]:
        over = threading.Event()

        def fault(*args: object, **options: object) -> Any:
            if request.param == "hangs":
                over.wait(60)
            raise StorageError("memory://secret cannot be read")

        def apply(patch: pytest.MonkeyPatch) -> None:
            for name in ("resolve", "changes", "channel_log", "versions", "channels", "tenants", "adapters"):
                patch.setattr(registry, name, fault)

        yield apply
        over.set()

    async def test_what_is_loaded_goes_on_and_the_rest_is_told_why(
        self, client: httpx.AsyncClient, publish: Publish, broken: Callable[..., None], replica: Replica
    ) -> None:
        publish(channel="prod")
        publish("acme/other")
        assert (await ask(client, "acme/support@prod")).status_code == 200
        with pytest.MonkeyPatch.context() as patch:
            broken(patch)
            for _ in range(3):
                assert (await ask(client, "acme/support@prod")).status_code == 200
                refused = await ask(client, "acme/other")
                assert refused.status_code == 503
                assert "the registry does not answer" in refused.json()["error"]["message"]
                assert refused.headers["retry-after"] and "secret" not in refused.text
        assert (await ask(client, "acme/support@prod")).status_code == 200

    async def test_one_that_lost_everything_is_no_reason_to_say_that_nothing_exists(
        self, client: httpx.AsyncClient, publish: Publish, registry: Any
    ) -> None:
        """As a folder that is not mounted any more."""
        publish(channel="prod")
        publish("acme/other")
        assert (await ask(client, "acme/support@prod")).status_code == 200
        assert (await ask(client, "acme/none")).status_code == 404
        kept = dict(registry.store._values)
        registry.store._values.clear()
        assert (await ask(client, "acme/support@prod")).status_code == 200
        assert (await ask(client, "acme/other")).status_code == 503
        registry.store._values.update(kept)
        assert (await ask(client, "acme/other")).status_code == 200

    async def test_when_it_is_back_it_is_asked_again(
        self, client: httpx.AsyncClient, publish: Publish, registry: Registry
    ) -> None:
        publish("acme/other")

        def away(*args: object) -> None:
            raise StorageError("away")

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(registry, "changes", away)
            assert (await ask(client, "acme/other")).status_code == 503
        assert (await ask(client, "acme/other")).status_code == 200

    async def test_a_file_of_other_bytes_is_never_loaded(
        self, client: httpx.AsyncClient, publish: Publish, registry: Any, engine: Any
    ) -> None:
        publish("acme/good")
        publish("acme/bad")
        values = registry.store._values
        largest = max((k for k in values if "blobs" in str(k)), key=lambda k: len(values[k]))
        values[largest] = values[largest][:-1] + bytes([values[largest][-1] ^ 1])
        answers = {model: await ask(client, model) for model in ("acme/good", "acme/bad")}
        assert sorted(a.status_code for a in answers.values()) == [200, 500]
        assert len(engine.held) == 1


class TestTheDisk:
    async def test_one_that_is_full_keeps_nobody_from_what_is_loaded(
        self, client: httpx.AsyncClient, publish: Publish, monkeypatch: pytest.MonkeyPatch, engine: Any
    ) -> None:
        """Files may grow no further than what was written already: to a program that is a full disk."""
        import errno

        publish("acme/kept")
        publish("acme/other")
        assert (await ask(client, "acme/kept")).status_code == 200

        def full(*args: object, **options: object) -> Any:
            raise OSError(errno.ENOSPC, "No space left on device")

        with monkeypatch.context() as patch:
            patch.setattr(Path, "mkdir", full)
            patch.setattr("os.mkdir", full)
            refused = await ask(client, "acme/other")
            assert refused.status_code == 503, refused.text
            assert "cache" not in refused.text
            assert (await ask(client, "acme/kept")).status_code == 200
        assert (await ask(client, "acme/other")).status_code == 200

    async def test_a_working_set_that_cannot_be_written_costs_a_warning(
        self, replica: Replica, engine: Any, caplog: pytest.LogCaptureFixture
    ) -> None:
        replica._working_set_path.parent.parent.mkdir(parents=True, exist_ok=True)
        replica._working_set_path.parent.write_text("a file where the folder should be")
        replica.watch()
        try:
            await engine.until(lambda: "cannot be written down" in caplog.text)
            assert not replica.not_ready
        finally:
            for watcher in replica._watchers:
                watcher.cancel()


@pytest.mark.parametrize("jump", [-86_400, -30, 86_400])
async def test_a_clock_that_jumps_neither_opens_nor_closes_the_minute_for_good(
    jump: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    quota, caller = Quota(), Caller("acme", key="k", limits=Limits(requests_per_minute=3))
    real = time.time
    for _ in range(3):
        await quota.count_request(caller)
    for shift in (0.0, jump):
        monkeypatch.setattr(time, "time", lambda shift=shift: real() + shift)
        with pytest.raises(TooManyRequests) as refused:
            await quota.count_request(caller)
        assert 0 <= refused.value.retry_after <= 120
