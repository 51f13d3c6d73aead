"""The counters in memory, against the library's own."""

from __future__ import annotations

import random
import time

import pytest
from limits import RateLimitItemPerMinute
from limits.aio.storage import MemoryStorage
from limits.aio.strategies import SlidingWindowCounterRateLimiter

from adapterhub.serving.tenants import windows
from adapterhub.serving.tenants.windows import Windows

pytestmark = pytest.mark.anyio
TEN = RateLimitItemPerMinute(10)


async def test_it_says_what_the_librarys_own_says(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [1_764_000_000.0]
    monkeypatch.setattr(time, "time", lambda: now[0])
    ours = SlidingWindowCounterRateLimiter(Windows(lambda: now[0]))
    theirs = SlidingWindowCounterRateLimiter(MemoryStorage())
    rng = random.Random(1)
    for _ in range(400):
        now[0] += rng.choice([0, 0.5, 3, 20, 61, 130])
        key, cost = rng.choice(["a", "b"]), rng.choice([1, 1, 2, 5])
        assert await ours.hit(TEN, key, cost=cost) == await theirs.hit(TEN, key, cost=cost)
        one, other = await ours.get_window_stats(TEN, key), await theirs.get_window_stats(TEN, key)
        assert one.remaining == other.remaining
        assert one.reset_time == pytest.approx(other.reset_time)


async def test_keys_of_long_ago_are_forgotten(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(windows, "_SWEEP", 10)
    now = [1_764_000_000.0]
    counts = Windows(lambda: now[0])
    limiter = SlidingWindowCounterRateLimiter(counts)
    for minute in range(100):
        now[0] = 1_764_000_000.0 + 60 * minute
        await limiter.hit(TEN, f"tenant {minute}")
    assert len(counts._counts) <= 10
    assert await counts.reset() and not counts._counts
