"""Asking a store or a Hub several things at once, or while something else is done."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import TypeVar

from adapterhub.errors import AdapterHubError

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


@contextmanager
def meanwhile(ask: Callable[[], object]) -> Iterator[None]:
    """Ask while the block runs. An error of the answer is raised at its end; a block that fails waits for none."""
    raised: list[AdapterHubError] = []

    def asked() -> None:
        try:
            ask()
        except AdapterHubError as error:
            raised.append(error)

    thread = threading.Thread(target=asked, name="ah-meanwhile", daemon=True)
    thread.start()
    yield
    thread.join()
    if raised:
        raise raised[0]
