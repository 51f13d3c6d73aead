"""An engine whose process lives and whose steps never end."""

from __future__ import annotations

import asyncio
from typing import Any

import httpx
import pytest
from fastapi import FastAPI

from adapterhub.serving import routes
from adapterhub.serving.middleware import TenancyMiddleware
from adapterhub.serving.pulse import Pulse
from adapterhub.serving.replica import Replica

pytestmark = pytest.mark.anyio
NO_TIME = 1e-6  # seconds: whatever does not answer at once hangs


async def test_an_engine_that_turns_is_healthy(engine: Any) -> None:
    pulse = Pulse(engine.beat, within=60)
    await pulse.look()
    assert not pulse.hangs


async def test_one_that_is_silent_hangs_until_it_goes_on(engine: Any, caplog: pytest.LogCaptureFixture) -> None:
    engine.turns.clear()
    pulse = Pulse(engine.beat, within=NO_TIME)
    looking = asyncio.create_task(pulse.look())
    await engine.until(lambda: pulse.hangs)
    assert "has not finished a step" in caplog.text
    engine.turns.set()
    await looking
    assert not pulse.hangs


async def test_with_no_bound_it_never_does(engine: Any) -> None:
    engine.turns.clear()
    pulse = Pulse(engine.beat, within=0)
    looking = asyncio.create_task(pulse.look())
    for _ in range(50):
        await asyncio.sleep(0)
    assert not pulse.hangs
    engine.turns.set()
    await looking


async def test_one_that_ended_is_not_said_to_hang(engine: Any) -> None:
    engine.is_dead = True
    pulse = Pulse(engine.beat, within=60)
    await pulse.look()
    assert not pulse.hangs


async def test_a_bug_of_ours_is_not_taken_for_a_pulse() -> None:
    async def broken() -> None:
        raise ValueError("no such call")

    with pytest.raises(ValueError, match="no such call"):
        await Pulse(broken, within=60).look()


async def test_load_balancers_and_the_supervisor_are_told(replica: Replica) -> None:
    app = FastAPI()
    routes.attach(app)
    app.add_middleware(TenancyMiddleware)
    app.state.adapterhub = replica
    async with httpx.AsyncClient(transport=httpx.ASGITransport(app=app), base_url="http://localhost") as client:
        assert (await client.get("/health")).status_code == 200
        replica.pulse.hangs = True
        hung = await client.get("/health")
        assert (hung.status_code, hung.json()) == (503, {"reason": "its engine hangs"})
        assert (await client.get("/ready")).json()["reason"] == "its engine hangs"
        refused = await client.post("/v1/completions", json={"model": "base", "prompt": "x"})
        assert refused.status_code == 503
        replica.pulse.hangs, replica.not_ready = False, "it is shutting down"
        assert (await client.get("/health")).status_code == 200, "it finishes what runs: nobody should kill it"
