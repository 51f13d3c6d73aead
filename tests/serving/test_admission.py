"""Waiting for a turn: who leaves early takes nobody's place along."""

from __future__ import annotations

import asyncio

import pytest

from adapterhub.serving.admission.admission import Admission, prompt_tokens, sequences
from adapterhub.serving.admission.fairness import Ask, Window

pytestmark = pytest.mark.anyio


@pytest.fixture
def anyio_backend() -> str:
    return "asyncio"


class People:
    """Requests at an admission with one sequence; `done` ends the one that is in."""

    def __init__(self, admission: Admission) -> None:
        self.admission = admission
        self.inside: list[str] = []
        self.ends: dict[str, asyncio.Event] = {}

    def come(self, name: str, tenant: str = "acme") -> asyncio.Task[None]:
        self.ends[name] = asyncio.Event()
        return asyncio.create_task(self._be(name, tenant))

    async def _be(self, name: str, tenant: str) -> None:
        async with self.admission.turn(Ask(tenant, None, self.admission.now())):
            self.inside.append(name)
            try:
                await self.ends[name].wait()
            finally:
                self.inside.remove(name)

    @staticmethod
    async def settle() -> None:
        for _ in range(10):
            await asyncio.sleep(0)


@pytest.fixture
def people() -> People:
    return People(Admission(Window(sequences=1)))


async def test_one_after_the_other(people: People) -> None:
    tasks = [people.come(name) for name in "abc"]
    for name in "abc":
        await people.settle()
        assert people.inside == [name]
        people.ends[name].set()
    await asyncio.gather(*tasks)
    assert people.admission.line.running == 0


async def test_who_leaves_while_waiting_is_passed_over(people: People) -> None:
    tasks = [people.come(name) for name in "abc"]
    await people.settle()
    tasks[1].cancel()
    people.ends["a"].set()
    await people.settle()
    assert people.inside == ["c"]
    people.ends["c"].set()
    await asyncio.gather(*tasks, return_exceptions=True)
    assert people.admission.line.waiting("acme") == 0


@pytest.mark.parametrize("leaves_first", [True, False])
async def test_who_leaves_at_the_moment_of_its_turn_blocks_nobody(people: People, leaves_first: bool) -> None:
    tasks = [people.come(name) for name in "abc"]
    await people.settle()
    if leaves_first:
        tasks[1].cancel()
        people.ends["a"].set()
    else:
        people.ends["a"].set()
        await asyncio.sleep(0)  # a ends in this round, b is called
        tasks[1].cancel()
    await people.settle()
    assert people.inside == ["c"]
    people.ends["c"].set()
    await asyncio.gather(*tasks, return_exceptions=True)
    assert people.admission.line.running == 0


async def test_a_failure_inside_gives_the_turn_back(people: People) -> None:
    with pytest.raises(RuntimeError):
        async with people.admission.turn(Ask("acme", None, 0.0)):
            raise RuntimeError
    assert people.admission.line.running == 0


async def test_a_kept_sequence_is_given_away_when_its_time_is_over() -> None:
    """Nobody comes or goes at that moment: a timer does it."""
    people = People(Admission(Window(sequences=2, active=0.05)))
    light = people.come("light", "light")
    noisy = [people.come(f"noisy{n}", "noisy") for n in range(3)]
    await people.settle()
    people.ends["light"].set()
    async with asyncio.timeout(10):
        while len(people.inside) < 2 or "light" in people.inside:
            await asyncio.sleep(0.001)
    for end in people.ends.values():
        end.set()
    await asyncio.gather(light, *noisy)


@pytest.mark.parametrize(
    ("body", "expected"),
    [
        ({}, 1),
        ({"n": 3}, 3),
        ({"n": "3"}, 1),
        ({"n": -1}, 1),
        ({"prompt": "hello"}, 1),
        ({"prompt": ["a", "b"], "n": 2}, 4),
        ({"prompt": [1, 2, 3]}, 1),
        ({"prompt": [[1], [2, 3]]}, 2),
        ({"prompt": []}, 1),
    ],
)
def test_how_many_answers_a_request_asks_for(body: dict[str, object], expected: int) -> None:
    assert sequences(body) == expected


def test_a_longer_prompt_weighs_more() -> None:
    assert 1 == prompt_tokens(2) < prompt_tokens(100) < prompt_tokens(1000)
