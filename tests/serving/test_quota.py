"""Limits counted in memory and in a real Redis, and Redis that goes away."""

from __future__ import annotations

import asyncio
import shutil
import socket
import subprocess
from collections.abc import Iterator

import pytest

from adapterhub.errors import TooManyRequests
from adapterhub.serving.tenants.callers import SINGLE_USER, Caller, Limits
from adapterhub.serving.tenants.quota import Quota

pytestmark = pytest.mark.anyio

ACME = Caller("acme", key="k1", limits=Limits(requests_per_minute=5, tokens_per_minute=100))


@pytest.fixture
def redis() -> Iterator[tuple[str, subprocess.Popen[bytes]]]:
    """A Redis of our own, where one is installed."""
    if shutil.which("redis-server") is None:
        pytest.skip("redis-server is not installed")
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = ["redis-server", "--port", str(port), "--bind", "127.0.0.1", "--save", "", "--appendonly", "no"]
    server = subprocess.Popen(command, stdout=subprocess.PIPE)
    assert server.stdout is not None
    for line in server.stdout:
        if b"Ready to accept connections" in line:
            break
    try:
        yield f"redis://127.0.0.1:{port}/0", server
    finally:
        server.kill()
        server.wait()
        server.stdout.close()


async def taken(quota: Quota, caller: Caller = ACME) -> bool:
    try:
        await quota.count_request(caller)
    except TooManyRequests:
        return False
    return True


async def test_nobody_is_limited_without_keys() -> None:
    quota = Quota()
    for _ in range(50):
        await quota.count_request(SINGLE_USER)
        await (await quota.reserve(SINGLE_USER, tokens=10**9)).settle(tokens=10**9)
    assert await quota.headers(SINGLE_USER) == []


async def test_a_reservation_counts_until_it_is_settled() -> None:
    quota = Quota()
    first = await quota.reserve(ACME, tokens=80)
    with pytest.raises(TooManyRequests) as refusal:
        await quota.reserve(ACME, tokens=80)
    assert refusal.value.retry_after <= 60 and (b"x-ratelimit-limit-tokens", b"100") in refusal.value.headers
    await first.settle(tokens=5)
    await (await quota.reserve(ACME, tokens=80)).settle(tokens=130)
    with pytest.raises(TooManyRequests):
        await quota.reserve(ACME, tokens=1)


async def test_servers_count_together_in_redis(redis: tuple[str, subprocess.Popen[bytes]]) -> None:
    servers = [Quota(redis[0]), Quota(redis[0])]
    assert [await taken(servers[i % 2]) for i in range(7)] == [True] * 5 + [False] * 2
    await (await servers[0].reserve(ACME, tokens=60)).settle(tokens=90)
    with pytest.raises(TooManyRequests):
        await servers[1].reserve(ACME, tokens=60)
    for server in servers:
        await server.close()


async def test_while_redis_is_away_each_counts_for_itself(
    redis: tuple[str, subprocess.Popen[bytes]], caplog: pytest.LogCaptureFixture
) -> None:
    url, process = redis
    quota = Quota(url)
    assert await taken(quota)
    process.kill()
    process.wait()
    assert [await taken(quota) for _ in range(6)] == [True] * 5 + [False]
    assert caplog.text.count("by this server alone") == 1
    await quota.close()


async def test_one_that_leaves_the_line_leaves_its_place() -> None:
    quota, caller = Quota(), Caller("acme", key="k", limits=Limits(concurrency=1))
    inside: list[int] = []

    async def request(number: int, done: asyncio.Event) -> None:
        async with quota.slot(caller):
            inside.append(number)
            await done.wait()

    done = asyncio.Event()
    tasks = [asyncio.create_task(request(i, done)) for i in range(4)]
    await asyncio.sleep(0)
    await asyncio.sleep(0)
    tasks[1].cancel()
    await asyncio.gather(tasks[1], return_exceptions=True)
    assert inside == [0]
    done.set()
    await asyncio.gather(*tasks, return_exceptions=True)
    assert inside == [0, 2, 3] and not quota._gates
