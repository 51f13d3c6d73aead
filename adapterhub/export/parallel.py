"""Blocks side by side: enough of them under way to keep cores and disk busy, few enough to bound memory."""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Callable, Generator, Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeVar

T = TypeVar("T")


def workers() -> int:
    """Blocks under way at once: one a core, and one that waits for the disk."""
    return min(8, os.cpu_count() or 1) + 1


def in_order(jobs: Iterable[Callable[[], T]]) -> Generator[T, None, None]:
    """Run jobs in threads and yield what they return, in their order; the first that raises ends it all.

    A job is taken from ``jobs`` only when its turn is near, so that what it holds in memory is made late. Closed early,
    the generator waits for the jobs under way: none writes any more when it is gone.
    """
    pending: deque[Future[T]] = deque()
    with ThreadPoolExecutor(workers(), "export") as pool:
        try:
            for job in jobs:
                pending.append(pool.submit(job))
                if len(pending) > 2 * workers():
                    yield pending.popleft().result()
            while pending:
                yield pending.popleft().result()
        finally:
            for future in pending:
                future.cancel()
