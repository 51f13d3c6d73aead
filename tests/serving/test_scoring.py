"""Candidates that are scored on prompts, before they have callers and while they have some."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse

from adapterhub.base import BaseModel
from adapterhub.errors import DataError, UsageError
from adapterhub.manifest import Record
from adapterhub.refs import AdapterName
from adapterhub.registry import Registry
from adapterhub.registry.views import rollouts
from adapterhub.serving.config import ServeConfig
from adapterhub.serving.middleware import TenancyMiddleware
from adapterhub.serving.replica import Replica
from adapterhub.serving.rollout.promptset import check_folder, read_prompts
from adapterhub.serving.rollout.trials import WHO
from adapterhub.serving.tenants.access import Access
from adapterhub.serving.tenants.keys import Directory

pytestmark = pytest.mark.anyio

NAME = AdapterName.parse("acme/support")
PROD = NAME.at("prod")
CHAT = "/v1/chat/completions"


class Scored:
    """A replica with prompts, around an engine that answers each version as it is told."""

    def __init__(self, config: ServeConfig, registry: Registry, base: BaseModel, engine: Any) -> None:
        self.answers = {"acme/support@1": "Paris", "acme/support@2": "Paris", "acme/support@3": "Berlin"}
        self.asked: list[dict[str, Any]] = []
        app = Starlette()
        app.add_route(CHAT, self._answer, methods=["POST"])
        app.add_middleware(TenancyMiddleware)

        async def nobody() -> Directory:
            return Directory()

        access = Access(nobody)  # with keys, and nobody has one
        self.replica = Replica(config, registry=registry, base=base, engine=engine, app=app, access=access)
        self.replica.not_ready = ""
        app.state.adapterhub = self.replica
        self.registry = registry

    async def _answer(self, request: Request) -> JSONResponse:
        body = await request.json()
        self.asked.append(body)
        content = self.answers[body["model"]]
        return JSONResponse({"choices": [{"message": {"content": content}}]}, status_code=200 if content else 500)

    def start(self, candidate: int, *, min_score: float = 0.6) -> None:
        rollouts.start(
            self.registry,
            name=NAME,
            channel="prod",
            candidate=candidate,
            weight=50,
            gates={"min_score": min_score},
            who="ana",
        )

    async def versions(self) -> list[int]:
        return [v.record.version for v in (await self.replica.rollout.deployment(PROD)).versions]

    async def followed(self) -> list[int]:
        await self.replica.poll()
        await self.replica.trials.settle()
        await self.replica.poll()
        return await self.versions()


@pytest.fixture
def prompts(tmp_path: Path) -> Path:
    rows = [
        {"prompt": "The capital of France?", "expected": "Paris"},
        {"messages": [{"role": "user", "content": "Of Germany?"}], "score": "regex:^Berlin$", "max_tokens": 4},
        {"prompt": "?", "score": "mine.py:long"},
    ]
    folder = tmp_path / "prompts"
    (folder / "acme").mkdir(parents=True)
    (folder / "acme" / "support.jsonl").write_text("\n".join(map(json.dumps, rows)) + "\n\n")
    (folder / "mine.py").write_text("def long(answer, reference):\n    return 2 * (len(answer) > 4)\n")
    return folder


@pytest.fixture
def scored(
    config: ServeConfig, registry: Registry, base: BaseModel, engine: Any, prompts: Path, publish: Callable[..., Record]
) -> Scored:
    publish(channel="prod")
    publish()
    publish()
    return Scored(replace(config, prompts=prompts), registry, base, engine)


async def test_a_candidate_that_scores_enough_gets_callers(scored: Scored) -> None:
    await scored.versions()
    scored.start(2)
    assert await scored.followed() == [1, 2]
    assert {body["model"] for body in scored.asked} == {"acme/support@2"}
    assert [body["max_tokens"] for body in scored.asked] == [64, 4, 64]
    assert scored.replica.state()["references"][0]["score"] == pytest.approx(2 / 3)


async def test_one_that_scores_too_little_never_gets_a_caller_and_goes_back(scored: Scored) -> None:
    await scored.versions()
    scored.start(2, min_score=0.7)
    assert await scored.followed() == [1]
    move = scored.registry.channels(NAME)["prod"]
    assert (move.kind, move.who) == ("rollback", WHO)
    assert move.why == "version 2: it scores 0.667 on the prompts for it, and 0.7 are asked"


async def test_nor_on_a_server_that_meets_the_channel_in_the_middle_of_a_rollout(scored: Scored) -> None:
    scored.start(3, min_score=0.7)
    assert await scored.versions() == [1]
    await scored.replica.rollout.settle()
    await scored.replica.trials.settle()
    assert scored.registry.channels(NAME)["prod"].kind == "rollback"


async def test_one_that_gets_worse_while_it_has_callers_goes_back(scored: Scored) -> None:
    await scored.versions()
    scored.start(2)
    assert await scored.followed() == [1, 2]
    scored.answers["acme/support@2"] = "I do"
    await scored.replica._score_candidates()
    assert await scored.followed() == [1]
    assert "it scores 0 on the prompts" in scored.registry.channels(NAME)["prod"].why


async def test_an_engine_that_does_not_answer_is_no_fault_of_the_candidates(scored: Scored) -> None:
    await scored.versions()
    scored.answers["acme/support@2"] = ""
    scored.start(2)
    assert await scored.followed() == [1]
    assert scored.registry.channels(NAME)["prod"].kind == "set"
    assert "cannot be scored" in scored.replica.state()["references"][0]["problem"]
    scored.answers["acme/support@2"] = "Paris"
    assert await scored.followed() == [1, 2]


async def test_without_prompts_the_gate_is_open_and_the_log_says_so(
    scored: Scored, prompts: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (prompts / "acme" / "support.jsonl").unlink()
    await scored.versions()
    scored.start(3, min_score=1)
    assert await scored.followed() == [1, 3]
    assert "has no prompts here" in caplog.text


async def test_nobody_from_outside_comes_in_that_way(scored: Scored) -> None:
    import httpx

    transport = httpx.ASGITransport(app=scored.replica.trials._score.__self__._app)  # type: ignore[attr-defined]
    async with httpx.AsyncClient(transport=transport, base_url="http://localhost") as client:
        await scored.replica.access.look()
        answer = await client.post(CHAT, json={"model": "acme/support@1"}, headers={"adapterhub.caller": "acme"})
        assert answer.status_code == 401
    await asyncio.sleep(0)


@pytest.mark.parametrize(
    ("row", "why"),
    [
        ("{", "is not JSON"), ("[]", "is no prompt"), ('{"prompt": 3, "expected": "x"}', "is no prompt"),
        ('{"prompt": "x"}', "says nothing of the answer"), ('{"prompt": "x", "expect": "y"}', "is no prompt"),
        ('{"prompt": "x", "score": "regex:("}', "is no regular expression"),
        ('{"prompt": "x", "score": "no"}', "no scorer"), ('{"prompt": "x", "score": "none.py:f"}', "was not found"),
        ('{"messages": "x", "expected": "x"}', "is no prompt"),
        ('{"prompt": "x", "expected": "x", "max_tokens": -1}', "is no prompt"),
    ],
)  # fmt: skip
def test_prompts_that_are_none_are_told_with_their_line(prompts: Path, row: str, why: str) -> None:
    file = prompts / "acme" / "support.jsonl"
    file.write_text(file.read_text() + row + "\n")
    with pytest.raises(DataError, match=r"support\.jsonl:5") as error:
        check_folder(prompts)
    assert why in str(error.value)


def test_a_folder_of_prompts(prompts: Path, tmp_path: Path) -> None:
    assert check_folder(prompts) == 1
    assert len(read_prompts(prompts, NAME)) == 3
    assert read_prompts(prompts, AdapterName.parse("acme/other")) == ()
    with pytest.raises(UsageError, match="is no folder"):
        check_folder(tmp_path / "nothing")
