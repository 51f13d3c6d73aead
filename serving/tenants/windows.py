"""The counters of a minute in this server's memory, for the library `limits`: a storage, as it takes them.

Its own storage in memory makes a task for every count that goes through all keys, which with many tenants takes longer
than the rest of a request. Here a key is one small list, and all is done where it is asked.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable

from limits.aio.storage import SlidingWindowCounterSupport, Storage

_SWEEP = 4096  # keys, after which those of long ago are removed


class Windows(Storage, SlidingWindowCounterSupport):
    """Sliding window counters. One event loop; not for threads.

    The window before counts with the share of it that is still within one length from now: between two windows nobody
    gets twice. By a clock that nobody sets.
    """

    STORAGE_SCHEME = None

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        super().__init__()
        self._clock = clock
        self._counts: dict[str, list[int]] = {}  # key → number of the window, counts of it and of the one before

    @property
    def base_exceptions(self) -> type[Exception]:
        return ArithmeticError

    def _window(self, key: str, expiry: int) -> tuple[list[int], float]:
        """The counts now, and how much of the window has passed."""
        number, passed = divmod(self._clock() / expiry, 1)
        counts = self._counts.get(key)
        if counts is None:
            if len(self._counts) >= _SWEEP:
                self._sweep(int(number))
            counts = self._counts[key] = [int(number), 0, 0]
        elif number > counts[0]:
            counts[:] = [int(number), 0, counts[1] if number == counts[0] + 1 else 0]
        return counts, passed

    def _sweep(self, number: int) -> None:
        for key in [key for key, counts in self._counts.items() if counts[0] < number - 1]:
            del self._counts[key]

    async def acquire_sliding_window_entry(self, key: str, limit: int, expiry: int, amount: int = 1) -> bool:
        counts, passed = self._window(key, expiry)
        if math.floor(counts[2] * (1 - passed) + counts[1]) + amount > limit:
            return False
        counts[1] += amount
        return True

    async def get_sliding_window(self, key: str, expiry: int) -> tuple[int, float, int, float]:
        """Count and seconds left, of the window before and of this one."""
        counts, passed = self._window(key, expiry)
        return counts[2], (1 - passed) * expiry if counts[2] else 0.0, counts[1], (2 - passed) * expiry

    async def clear_sliding_window(self, key: str, expiry: int) -> None:
        self._counts.pop(key, None)

    # ── what else a storage has: plain counters, for which windows without a slide will do ───────────────────

    async def incr(self, key: str, expiry: int, amount: int = 1) -> int:
        counts, _ = self._window(key, expiry)
        counts[1] += amount
        return counts[1]

    async def get(self, key: str) -> int:
        return self._counts.get(key, [0, 0, 0])[1]

    async def get_expiry(self, key: str) -> float:
        return time.time()

    async def check(self) -> bool:
        return True

    async def reset(self) -> int:
        gone = len(self._counts)
        self._counts.clear()
        return gone

    async def clear(self, key: str) -> None:
        self._counts.pop(key, None)
