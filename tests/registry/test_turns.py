"""How publishers of one adapter stay out of each other's way."""

from __future__ import annotations

import heapq
import itertools
import random
import statistics
from collections.abc import Callable

import pytest

from adapterhub.refs import AdapterName
from adapterhub.registry import Draft, ObjectRegistry, layout
from adapterhub.registry.lifecycle.intents import Intents
from adapterhub.registry.memory import MemoryStore
from adapterhub.registry.store import create_hint
from adapterhub.registry.turns import LONGEST, pause

NAME = AdapterName("acme", "support")


def tries(*, writers: int, publishes: int, latency: float, wait: Callable[[int, float], float]) -> tuple[float, float]:
    """Median tries of one publish, and seconds of all: writers who read, then create two round trips later."""
    chance = random.Random(0)
    order = itertools.count()
    newest, needed, now = 0, [], 0.0
    # (when, tie, number that was read or None, tries so far, publishes left)
    events = [(chance.uniform(0, latency), next(order), -1, 0, publishes) for _ in range(writers)]
    heapq.heapify(events)
    while events:
        now, _, read, tried, left = heapq.heappop(events)
        trip = 2 * latency * chance.uniform(0.8, 1.2)
        if read < 0:  # it reads; it creates after that
            heapq.heappush(events, (now + trip, next(order), newest, tried + 1, left))
        elif read == newest:  # it won
            newest += 1
            needed.append(tried)
            if left > 1:  # the next publish is some ten requests away from its first look
                heapq.heappush(events, (now + 10 * latency, next(order), -1, 0, left - 1))
        else:
            again = now + wait(len(events) + 1, trip + latency)
            heapq.heappush(events, (again, next(order), -1, tried, left))
    assert newest == writers * publishes
    return statistics.median(needed), now


@pytest.mark.parametrize("latency", [0.0001, 0.01, 0.3])
@pytest.mark.parametrize("writers", [2, 8, 32, 100])
def test_a_publish_needs_three_tries_at_most(writers: int, latency: float) -> None:
    random.seed(1)
    found, seconds = tries(
        writers=writers, publishes=10, latency=latency, wait=lambda crowd, took: pause(crowd=crowd, took=took)
    )
    assert found <= 3
    at_once, _ = tries(writers=writers, publishes=10, latency=latency, wait=lambda crowd, took: 0)
    assert writers < 32 or at_once > 3 * found  # without waiting most tries are in vain
    assert seconds < 10 * writers * 10 * latency  # and waiting does not leave the number unused for long


def test_nobody_waits_for_long_whatever_was_left_behind() -> None:
    assert all(0 <= pause(crowd=10**6, took=1) <= LONGEST for _ in range(100))
    assert all(0 <= pause(crowd=0, took=0.1) <= 0.1 for _ in range(100))


def test_the_crowd_are_those_who_sealed_their_publish() -> None:
    """And not those who still upload, nor what a collector gave up."""
    store = MemoryStore()
    for number in range(3):
        create_hint(store, layout.seal("acme", f"given-up-{number}"), b"given up")
        create_hint(store, layout.intent("acme", f"uploads-{number}"), b"{}")
    for number in range(5):
        create_hint(store, layout.intent("acme", f"commits-{number}"), b"{}")
        create_hint(store, layout.seal("acme", f"commits-{number}"), b"commits")
    assert Intents(store).committing("acme") == 5
    assert Intents(store).committing("elsewhere") == 0


def test_a_lost_try_waits_and_the_first_does_not(new_draft: Callable[..., Draft]) -> None:
    class Overtaken(MemoryStore):
        """Somebody publishes between our look and our commit, twice."""

        left = 2

        def create(self, key: str, value: bytes, *, lasting: bool = True) -> None:
            if key.startswith(layout.versions(NAME)) and self.left:
                left, self.left = self.left, 0
                ObjectRegistry(self).publish(new_draft(), name=NAME, author="bo")
                self.left = left - 1
            super().create(key, value, lasting=lasting)

    waits: list[float] = []
    record = ObjectRegistry(Overtaken(), wait=waits.append).publish(new_draft(), name=NAME, author="ana")
    assert record.version == 3
    assert len(waits) == 2
