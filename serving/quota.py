"""How much a caller may take: requests and tokens a minute, requests at once, and how many wait.

    quota.count_request(caller)      when it comes: 429 where the minute is full
    quota.reserve(caller, tokens=…)  held until the answer ends, then charged for what it really took
    quota.slot(caller)               one of `concurrency`; waits for it
    quota.waiting(caller)            one of `queue`; 429 where that is full

Every limit is the tenant's over all its keys, and the key's own beside it; both must allow. The counting is done by
the library `limits` (a sliding window), in memory or in Redis, where all servers count together. While Redis is away
each counts for itself. Reservations and slots are this server's own.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import math
import time
from collections import Counter, deque
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from dataclasses import dataclass
from typing import Any, Literal, TypeVar

from limits import RateLimitItemPerMinute
from limits.aio.storage import MemoryStorage, RedisStorage
from limits.aio.strategies import SlidingWindowCounterRateLimiter
from limits.errors import ConfigurationError, StorageError

from adapterhub.errors import MissingDependency, TooManyRequests, UsageError
from adapterhub.serving.callers import Caller, Limits

log = logging.getLogger(__name__)

T = TypeVar("T")
What = Literal["requests", "tokens"]
Storage = MemoryStorage | RedisStorage
_REDIS_PAUSE = 5.0  # seconds after a failure in which Redis is not asked: requests do not wait for it one by one
_REDIS_SECONDS = 0.25  # for an answer of Redis
_EVERYTHING = 2**53  # a limit that charges whatever it is: what was used is used
_SOON = 1.0  # seconds after which it is worth to come again for a slot


@dataclass(frozen=True)
class Subject:
    """Who is counted: a tenant, or one of its keys."""

    kind: Literal["tenant", "key"]
    name: str
    limits: Limits

    def per_minute(self, what: What) -> int | None:
        return self.limits.requests_per_minute if what == "requests" else self.limits.tokens_per_minute

    @property
    def id(self) -> str:
        return f"{self.kind}/{self.name}"


def subjects(caller: Caller) -> tuple[Subject, ...]:
    """The key first: what it may not take is not taken from its tenant. Nobody without keys."""
    if caller.tenant is None or caller.key is None:
        return ()
    return (Subject("key", caller.key, caller.key_limits), Subject("tenant", caller.tenant, caller.limits))


class Reservation:
    """Tokens that are held for one request, until `settle`."""

    def __init__(self, quota: Quota, held: dict[Subject, int]) -> None:
        self._quota = quota
        self._held = held

    async def settle(self, *, tokens: int) -> None:
        """The request is over and took this many."""
        await self._quota._settle(self._held, tokens)


class Quota:
    """The counters of one server. One event loop; not for threads."""

    def __init__(self, redis: str | None = None) -> None:
        """``redis`` is a URL like redis://host:6379/0."""
        self._memory = MemoryStorage()
        self._redis = _redis(redis) if redis else None
        self._redis_from = 0.0  # when Redis may be asked again
        self._reserved: Counter[str] = Counter()  # tokens, by subject
        self._waiting: Counter[str] = Counter()
        self._gates: dict[str, _Gate] = {}

    async def count_request(self, caller: Caller) -> None:
        """Raises TooManyRequests."""
        for subject in subjects(caller):
            if (most := subject.per_minute("requests")) is None:
                continue
            if not await self._hit(RateLimitItemPerMinute(most), subject):
                raise await self._refusal(caller, subject, "requests")

    async def reserve(self, caller: Caller, *, tokens: int) -> Reservation:
        """``tokens`` is a guess; what a request really took is charged when it is over. Raises TooManyRequests."""
        held: dict[Subject, int] = {}
        for subject in subjects(caller):
            if (most := subject.per_minute("tokens")) is None:
                continue
            needed = min(tokens, most)  # so that what is larger than a minute can pass at all
            if await self._remaining(subject, "tokens") < needed:
                self._release(held)
                raise await self._refusal(caller, subject, "tokens")
            held[subject] = needed
            self._reserved[subject.id] += needed
        return Reservation(self, held)

    @contextlib.asynccontextmanager
    async def slot(self, caller: Caller) -> AsyncIterator[None]:
        """One of the requests at once; waits until there is one."""
        async with contextlib.AsyncExitStack() as slots:
            for subject in subjects(caller):
                if (most := subject.limits.concurrency) is not None:
                    gate = self._gates.setdefault(subject.id, _Gate())
                    await gate.enter(most)
                    slots.callback(self._leave, subject.id, gate)
            yield

    def _leave(self, subject: str, gate: _Gate) -> None:
        gate.leave()
        if gate.is_empty:
            del self._gates[subject]

    @contextlib.contextmanager
    def waiting(self, caller: Caller) -> Iterator[None]:
        """Around the wait of a request that cannot go at once. Raises TooManyRequests."""
        counted = [s for s in subjects(caller) if s.limits.queue is not None]
        for subject in counted:
            if self._waiting[subject.id] >= (subject.limits.queue or 0):
                raise TooManyRequests(
                    f"too many requests of this {subject.kind} wait",
                    why=f"at most {subject.limits.queue}",
                    retry_after=_SOON,
                )
        self._waiting.update(s.id for s in counted)
        try:
            yield
        finally:
            self._waiting.subtract(s.id for s in counted)

    async def headers(self, caller: Caller) -> list[tuple[bytes, bytes]]:
        """``x-ratelimit-…``, of the subject that has the least left; none where nothing is limited."""
        found: list[tuple[bytes, bytes]] = []
        kinds: tuple[What, ...] = ("requests", "tokens")
        for what in kinds:
            limited = [(s, most) for s in subjects(caller) if (most := s.per_minute(what)) is not None]
            if not limited:
                continue
            left = [(await self._remaining(subject, what), most, subject) for subject, most in limited]
            remaining, most, subject = min(left, key=lambda entry: entry[:2])
            seconds = await self._reset(subject, what)
            values = {"limit": str(most), "remaining": str(max(0, remaining)), "reset": f"{math.ceil(seconds)}s"}
            found += [(f"x-ratelimit-{name}-{what}".encode(), value.encode()) for name, value in values.items()]
        return found

    async def _hit(self, item: RateLimitItemPerMinute, subject: Subject) -> bool:
        return await self._ask(lambda at: at.hit(item, "requests", subject.id))

    async def close(self) -> None:
        """Give the connections to Redis back."""
        if self._redis is not None:
            bridge: Any = self._redis.bridge
            await bridge.get_connection().aclose()

    # ── the windows ──────────────────────────────────────────────────────────────────────────────────────────

    async def _remaining(self, subject: Subject, what: What) -> int:
        item = RateLimitItemPerMinute(subject.per_minute(what) or 0)
        stats = await self._ask(lambda at: at.get_window_stats(item, what, subject.id))
        return stats.remaining - (self._reserved[subject.id] if what == "tokens" else 0)

    async def _reset(self, subject: Subject, what: What) -> float:
        item = RateLimitItemPerMinute(subject.per_minute(what) or 0)
        stats = await self._ask(lambda at: at.get_window_stats(item, what, subject.id))
        return max(0.0, stats.reset_time - time.time())

    async def _settle(self, held: dict[Subject, int], tokens: int) -> None:
        self._release(held)
        for subject in held if tokens else ():
            await self._charge(subject, tokens)

    async def _charge(self, subject: Subject, tokens: int) -> None:
        """Past `hit`, which refuses what is over the limit: this has been used already."""
        item = RateLimitItemPerMinute(subject.per_minute("tokens") or 0)
        key, span = item.key_for("tokens", subject.id), item.get_expiry()
        await self._ask(lambda at: _storage(at).acquire_sliding_window_entry(key, _EVERYTHING, span, tokens))

    def _release(self, held: dict[Subject, int]) -> None:
        for subject, tokens in held.items():
            self._reserved[subject.id] -= tokens
            if not self._reserved[subject.id]:
                del self._reserved[subject.id]

    async def _refusal(self, caller: Caller, subject: Subject, what: What) -> TooManyRequests:
        return TooManyRequests(
            f"too many {what} of this {subject.kind}",
            why=f"at most {subject.per_minute(what)} a minute",
            retry_after=await self._reset(subject, what),
            headers=tuple(await self.headers(caller)),
        )

    async def _ask(self, question: Callable[[SlidingWindowCounterRateLimiter], Awaitable[T]]) -> T:
        """Redis where there is one and it answers, else this process's own memory."""
        if self._redis is not None and time.monotonic() >= self._redis_from:
            try:
                return await question(SlidingWindowCounterRateLimiter(self._redis))
            except StorageError as error:
                log.error("limits are counted by this server alone for now: Redis: %s", error.storage_error)
                self._redis_from = time.monotonic() + _REDIS_PAUSE
        return await question(SlidingWindowCounterRateLimiter(self._memory))


class _Gate:
    """At most so many inside, in the order of coming."""

    def __init__(self) -> None:
        self._inside = 0
        self._most = 0
        self._line: deque[asyncio.Future[None]] = deque()

    @property
    def is_empty(self) -> bool:
        return not self._inside and not self._line

    async def enter(self, most: int) -> None:
        """``most`` may be another one than the last time: an operator changed it."""
        self._most = most
        called: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._line.append(called)
        self._call()
        try:
            await called
        except asyncio.CancelledError:
            if called.done() and not called.cancelled():
                self.leave()  # called a moment before it left
            else:
                self._line.remove(called)
            raise

    def leave(self) -> None:
        self._inside -= 1
        self._call()

    def _call(self) -> None:
        while self._line and self._inside < self._most:
            called = self._line.popleft()
            if not called.cancelled():
                self._inside += 1
                called.set_result(None)


def check_redis(url: str) -> None:
    """Whether limits can be counted there. One that is away now may come. Raises UsageError, MissingDependency."""
    _redis(url)


def _storage(limiter: SlidingWindowCounterRateLimiter) -> Storage:
    storage = limiter.storage
    assert isinstance(storage, MemoryStorage | RedisStorage)
    return storage


def _redis(url: str) -> RedisStorage:
    """Raises UsageError, MissingDependency."""
    if not url.startswith(("redis://", "rediss://")):
        raise UsageError("AH_REDIS_URL is not a Redis URL", why="it is like redis://host:6379/0")
    try:
        return RedisStorage(
            f"async+{url}",
            wrap_exceptions=True,
            implementation="redispy",
            key_prefix="adapterhub",
            socket_timeout=_REDIS_SECONDS,
            socket_connect_timeout=_REDIS_SECONDS,
        )
    except ConfigurationError as error:
        raise MissingDependency(
            "the client for Redis is not installed", why=str(error), hint="pip install 'adapterhub[redis]'"
        ) from error
