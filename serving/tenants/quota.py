"""How much a caller may take: requests and tokens a minute, requests at once, and how many wait.

    quota.count_request(caller)      when it comes: 429 where the minute is full
    quota.reserve(caller, tokens=…)  held until the answer ends, then charged for what it really took
    quota.slot(caller)               one of `concurrency`; waits for it
    quota.waiting(caller)            one of `queue`; 429 where that is full

Every limit is the tenant's over all its keys, and the key's own beside it; both must allow. The counting is done by
the library `limits` (a sliding window), in memory (`windows`) or in Redis, where all servers count together. While
Redis is away each counts for itself. Reservations and slots are this server's own.
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
from functools import lru_cache
from typing import Any, TypeVar

from limits import RateLimitItemPerMinute
from limits.aio.storage import RedisStorage
from limits.aio.strategies import SlidingWindowCounterRateLimiter
from limits.errors import ConfigurationError, StorageError

from adapterhub.errors import MissingDependency, TooManyRequests, UsageError
from adapterhub.serving.tenants.callers import Caller, Subject, What
from adapterhub.serving.tenants.windows import Windows

log = logging.getLogger(__name__)

T = TypeVar("T")
Storage = Windows | RedisStorage
_REDIS_PAUSE = 5.0  # seconds after a failure in which Redis is not asked: requests do not wait for it one by one
_REDIS_SECONDS = 0.25  # for an answer of Redis
_EVERYTHING = 2**53  # a limit that charges whatever it is: what was used is used
_HEADERS_AGE = 0.1  # seconds for which what the headers say may be old: what others took meanwhile is not in it
_SOON = 1.0  # seconds after which it is worth to come again for a slot


@dataclass
class _Known:
    """A window as it was last seen, less what was taken here since."""

    remaining: int
    reset: float  # seconds since 1970
    at: float


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
        # made once: a limiter looks at length at the storage that it is given
        self._memory = SlidingWindowCounterRateLimiter(Windows())
        self._redis = SlidingWindowCounterRateLimiter(_redis(redis)) if redis else None
        self._redis_from = 0.0  # when Redis may be asked again
        self._reserved: Counter[str] = Counter()  # tokens, by subject
        self._waiting: Counter[str] = Counter()
        self._known: dict[tuple[str, What], _Known] = {}  # windows, for the headers of answers
        self._gates: dict[str, _Gate] = {}

    async def count_request(self, caller: Caller) -> None:
        """Raises TooManyRequests."""
        for subject in caller.subjects:
            if (most := subject.per_minute("requests")) is None:
                continue
            if not await self._hit(_per_minute(most), subject):
                raise await self._refusal(caller, subject, "requests")

    async def reserve(self, caller: Caller, *, tokens: int) -> Reservation:
        """``tokens`` is a guess; what a request really took is charged when it is over. Raises TooManyRequests."""
        held: dict[Subject, int] = {}
        for subject in caller.subjects:
            if (most := subject.per_minute("tokens")) is None:
                continue
            needed = min(tokens, most)  # so that what is larger than a minute can pass at all
            if (await self._window(subject, "tokens"))[0] < needed:
                self._release(held)
                raise await self._refusal(caller, subject, "tokens")
            held[subject] = needed
            self._reserved[subject.id] += needed
        return Reservation(self, held)

    def is_free(self, caller: Caller) -> bool:
        """Whether `slot` would not wait."""
        gates = ((self._gates.get(s.id), s.limits.concurrency) for s in caller.subjects)
        return all(gate is None or most is None or gate.has_room(most) for gate, most in gates)

    @contextlib.asynccontextmanager
    async def slot(self, caller: Caller) -> AsyncIterator[None]:
        """One of the requests at once; waits until there is one."""
        leave = await self.take_slot(caller)
        try:
            yield
        finally:
            leave()

    async def take_slot(self, caller: Caller) -> Callable[[], None]:
        """One of the requests at once, when there is one, and the way to give it back."""
        taken: list[tuple[str, _Gate]] = []

        def leave() -> None:
            for subject, gate in taken:
                gate.leave()
                if gate.is_empty:
                    del self._gates[subject]

        try:
            for subject in caller.subjects:
                if (most := subject.limits.concurrency) is not None:
                    gate = self._gates.setdefault(subject.id, _Gate())
                    await gate.enter(most)
                    taken.append((subject.id, gate))
        except asyncio.CancelledError:
            leave()
            raise
        return leave

    @contextlib.contextmanager
    def waiting(self, caller: Caller) -> Iterator[None]:
        """Around the wait of a request that cannot go at once. Raises TooManyRequests."""
        counted = [s for s in caller.subjects if s.limits.queue is not None]
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
            limited = [(s, most) for s in caller.subjects if (most := s.per_minute(what)) is not None]
            if not limited:
                continue
            windows = [(*await self._window(subject, what, age=_HEADERS_AGE), most) for subject, most in limited]
            remaining, seconds, most = min(windows, key=lambda window: (window[0], window[2]))
            values = {"limit": str(most), "remaining": str(max(0, remaining)), "reset": f"{math.ceil(seconds)}s"}
            found += [(f"x-ratelimit-{name}-{what}".encode(), value.encode()) for name, value in values.items()]
        return found

    async def _hit(self, item: RateLimitItemPerMinute, subject: Subject) -> bool:
        self._took(subject, "requests", 1)
        return await self._ask(lambda at: at.hit(item, "requests", subject.id))

    async def close(self) -> None:
        """Give the connections to Redis back."""
        if self._redis is not None:
            storage: Any = self._redis.storage
            await storage.bridge.get_connection().aclose()

    # ── the windows ──────────────────────────────────────────────────────────────────────────────────────────

    async def _window(self, subject: Subject, what: What, *, age: float = 0.0) -> tuple[int, float]:
        """What is left of a minute, and the seconds until it is whole again; known for at most ``age`` seconds."""
        now = time.time()
        known = self._known.get((subject.id, what))
        if known is None or not 0 <= now - known.at <= age:
            item = _per_minute(subject.per_minute(what) or 0)
            stats = await self._ask(lambda at: at.get_window_stats(item, what, subject.id))
            known = self._known[subject.id, what] = _Known(stats.remaining, stats.reset_time, now)
        reserved = self._reserved[subject.id] if what == "tokens" else 0
        return known.remaining - reserved, max(0.0, known.reset - now)

    def _took(self, subject: Subject, what: What, amount: int) -> None:
        if known := self._known.get((subject.id, what)):
            known.remaining = max(0, known.remaining - amount)

    async def _settle(self, held: dict[Subject, int], tokens: int) -> None:
        self._release(held)
        for subject in held if tokens else ():
            await self._charge(subject, tokens)

    async def _charge(self, subject: Subject, tokens: int) -> None:
        """Past `hit`, which refuses what is over the limit: this has been used already."""
        item = _per_minute(subject.per_minute("tokens") or 0)
        self._took(subject, "tokens", tokens)
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
            retry_after=(await self._window(subject, what))[1],
            headers=tuple(await self.headers(caller)),
        )

    async def _ask(self, question: Callable[[SlidingWindowCounterRateLimiter], Awaitable[T]]) -> T:
        """Redis where there is one and it answers, else this process's own memory."""
        if self._redis is not None and time.monotonic() >= self._redis_from:
            try:
                return await question(self._redis)
            except StorageError as error:
                log.error("limits are counted by this server alone for now: Redis: %s", error.storage_error)
                self._redis_from = time.monotonic() + _REDIS_PAUSE
        return await question(self._memory)


class _Gate:
    """At most so many inside, in the order of coming."""

    def __init__(self) -> None:
        self._inside = 0
        self._most = 0
        self._line: deque[asyncio.Future[None]] = deque()

    @property
    def is_empty(self) -> bool:
        return not self._inside and not self._line

    def has_room(self, most: int) -> bool:
        return not self._line and self._inside < most

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


@lru_cache(1024)
def _per_minute(most: int) -> RateLimitItemPerMinute:
    return RateLimitItemPerMinute(most)


def _storage(limiter: SlidingWindowCounterRateLimiter) -> Storage:
    storage = limiter.storage
    assert isinstance(storage, Windows | RedisStorage)
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
