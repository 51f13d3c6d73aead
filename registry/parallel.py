"""Asking a store or a Hub several things at once: each answer waits on the network, none on another."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

T = TypeVar("T")
R = TypeVar("R")

THREADS = 8


def side_by_side(ask: Callable[[T], R], of: Iterable[T]) -> list[R]:
    """In the order of ``of``."""
    asked = list(of)
    if len(asked) < 2:
        return [ask(one) for one in asked]
    with ThreadPoolExecutor(THREADS) as pool:
        return list(pool.map(ask, asked))
