"""What a receiver is told: which events, in which order, signed, and tried again."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Callable
from dataclasses import replace
from typing import Any

import httpx
import pytest
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import PlainTextResponse

from adapterhub.errors import UsageError
from adapterhub.manifest import Record
from adapterhub.refs import AdapterName, AdapterRef
from adapterhub.registry import Registry
from adapterhub.registry.views import rollouts
from adapterhub.serving.config import ServeConfig
from adapterhub.serving.replica import Replica
from adapterhub.serving.rollout.webhook import Webhook, check_url, signature

pytestmark = pytest.mark.anyio

NAME = AdapterName.parse("acme/support")
PROD = NAME.at("prod")


class Receiver:
    """Takes events; answers with ``statuses`` first."""

    def __init__(self) -> None:
        self.statuses: list[int] = []
        self.bodies: list[dict[str, Any]] = []
        self.headers: list[httpx.Headers] = []
        self.raw: list[bytes] = []
        self.pauses: list[float] = []
        app = Starlette()
        app.add_route("/hook", self._take, methods=["POST"])
        self.webhook = Webhook(
            "http://receiver/hook",
            secret="s3cret",
            server="127.0.0.1:8000",
            transport=httpx.ASGITransport(app=app),
            sleep=self._sleep,
        )

    async def _sleep(self, seconds: float) -> None:
        self.pauses.append(seconds)

    async def _take(self, request: Request) -> PlainTextResponse:
        status = self.statuses.pop(0) if self.statuses else 204
        if status == 204:
            self.raw.append(await request.body())
            self.bodies.append(json.loads(self.raw[-1]))
            self.headers.append(httpx.Headers(request.headers.raw))
        return PlainTextResponse("", status_code=status)

    @property
    def kinds(self) -> list[str]:
        return [body["event"] for body in self.bodies]


@pytest.fixture
async def receiver() -> AsyncIterator[Receiver]:
    receiver = Receiver()
    delivering = asyncio.create_task(receiver.webhook.deliver())
    yield receiver
    delivering.cancel()
    await asyncio.gather(delivering, return_exceptions=True)


@pytest.fixture
def told(replica: Replica, receiver: Receiver) -> Replica:
    """A replica whose events go to the receiver."""
    replica.rollout._tell = receiver.webhook.tell
    return replica


async def test_the_life_of_a_rollout(
    told: Replica, receiver: Receiver, registry: Registry, publish: Callable[..., Record], engine: Any
) -> None:
    publish(channel="prod")
    publish()
    publish()
    await told.rollout.deployment(PROD)

    async def after(*moves: Callable[[], object]) -> list[str]:
        seen = len(receiver.bodies)
        for move in moves:
            move()
            await told.poll()
        await engine.until(lambda: len(receiver.bodies) == seen + len(moves))
        return receiver.kinds[seen:]

    def start(weight: int, candidate: int = 2) -> Callable[[], object]:
        return lambda: rollouts.start(
            registry, name=NAME, channel="prod", candidate=candidate, weight=weight, gates={}, who="ana", why="new tone"
        )

    def verb(which: Callable[..., object]) -> Callable[[], object]:
        return lambda: which(registry, name=NAME, channel="prod", who="ana", why="it is better")

    assert await after(start(5), start(50)) == ["canary.start", "canary.step"]
    first = receiver.bodies[0]
    assert first["reference"] == "acme/support@prod" and first["server"] == "127.0.0.1:8000"
    assert (first["from"], first["to"]) == ({"acme/support@1": 100}, {"acme/support@1": 95, "acme/support@2": 5})
    assert (first["who"], first["why"], first["candidate"], first["seq"]) == ("ana", "new tone", 2, 2)
    assert await after(verb(rollouts.pause)) == ["canary.pause"]
    assert await after(start(5), verb(rollouts.promote)) == ["canary.start", "canary.promote"]
    assert await after(start(5, 3), verb(rollouts.abort)) == ["canary.start", "canary.rollback"]
    assert receiver.bodies[-1]["why"] == "it is better"
    flip = await after(lambda: registry.set_channel(NAME, "prod", {1: 100}, who="ana"))
    assert flip == ["flip"] and receiver.bodies[-1]["to"] == {"acme/support@1": 100}
    assert len({body["id"] for body in receiver.bodies}) == len(receiver.bodies)


async def test_a_candidate_that_is_sent_back_before_it_had_callers_is_told_too(
    told: Replica, receiver: Receiver, registry: Registry, publish: Callable[..., Record], engine: Any
) -> None:
    publish(channel="prod")
    publish()
    await told.rollout.deployment(PROD)

    async def score(version: Any) -> float:
        return 0.25

    told.trials._score = score
    gates = {"min_score": 0.9}
    rollouts.start(registry, name=NAME, channel="prod", candidate=2, weight=5, gates=gates, who="ana")
    await told.poll()
    await told.trials.settle()
    await engine.until(lambda: receiver.bodies)
    (body,) = receiver.bodies
    assert (body["event"], body["to"]) == ("canary.rollback", {"acme/support@1": 100})
    assert (body["who"], body["candidate"]) == ("ah serve", 2) and "it scores 0.25" in body["why"]


async def test_what_it_is_signed_with(told: Replica, receiver: Receiver, publish: Any, engine: Any) -> None:
    publish(channel="prod")
    await told.rollout.deployment(PROD)
    publish(channel="prod")
    await told.poll()
    await engine.until(lambda: receiver.raw)
    headers = receiver.headers[0]
    expected = signature("s3cret", headers["x-adapterhub-timestamp"], receiver.raw[0])
    assert headers["x-adapterhub-signature"] == f"sha256={expected}"
    assert (headers["x-adapterhub-event"], headers["x-adapterhub-id"]) == ("flip", receiver.bodies[0]["id"])


async def test_a_receiver_that_stumbles_gets_it_later_and_one_that_refuses_does_not(
    told: Replica, receiver: Receiver, publish: Any, engine: Any, caplog: pytest.LogCaptureFixture
) -> None:
    publish(channel="prod")
    await told.rollout.deployment(PROD)
    receiver.statuses = [500, 429, 503]
    publish(channel="prod")
    await told.poll()
    await engine.until(lambda: receiver.bodies)
    assert receiver.pauses == [1, 2, 4]
    receiver.statuses = [400]
    publish(channel="prod")
    await told.poll()
    await engine.until(lambda: "did not take flip of acme/support@prod: 400" in caplog.text)
    receiver.statuses = [500] * 8
    publish(channel="prod")
    await told.poll()
    await engine.until(lambda: "prod: 500" in caplog.text)
    assert receiver.pauses[3:] == [1, 2, 4, 8, 16, 32, 60]
    publish(channel="prod")
    await told.poll()
    await engine.until(lambda: len(receiver.bodies) == 2)
    assert receiver.bodies[-1]["to"] == {"acme/support@5": 100}


async def test_no_request_waits_for_a_receiver_that_hangs(
    config: ServeConfig, registry: Registry, publish: Any
) -> None:
    """Nobody delivers at all: serving goes on, and the oldest events are lost."""
    publish(channel="prod")
    webhook = Webhook("http://nobody/", server="x")
    ref = AdapterRef.parse("acme/support@prod")
    from adapterhub.serving.rollout.deployment import read_deployment
    from adapterhub.serving.rollout.events import event_of

    deployment = read_deployment(registry, ref)
    for _ in range(1500):
        webhook.tell(event_of(ref, deployment, deployment))
    assert len(webhook._waiting) == 1000


@pytest.mark.parametrize("url", ["", "hooks.example.com", "ftp://x/y", "http://", "file:///etc/passwd"])
def test_what_is_no_url(url: str) -> None:
    with pytest.raises(UsageError, match="--webhook"):
        check_url(url)


def test_its_secret_is_shown_nowhere(config: ServeConfig) -> None:
    from adapterhub.serving.admin import shown

    values = shown(replace(config, webhook="http://ana:pass@hooks/T0/B0", webhook_secret="s3cret"))
    assert (values["webhook"], values["webhook_signed"]) == ("hooks", True)
    assert not [part for part in ("s3cret", "pass", "T0") if part in json.dumps(values)]
