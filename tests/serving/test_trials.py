"""When a candidate goes back by itself."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from adapterhub.errors import StorageError
from adapterhub.manifest import Record
from adapterhub.refs import AdapterName, AdapterRef
from adapterhub.registry import Registry
from adapterhub.registry.views import rollouts
from adapterhub.registry.views.rollouts import Gates
from adapterhub.serving.replica import Replica
from adapterhub.serving.rollout.trials import WHO, Tally, Trials, verdict

pytestmark = pytest.mark.anyio

NAME = AdapterName.parse("acme/support")
PROD = NAME.at("prod")
GATES = Gates(max_error_rate=0.1, max_slowdown=2, min_requests=10)


def tally(*, answers: int = 10, failed: int = 0, seconds: float = 0.1) -> Tally:
    made = Tally()
    for number in range(answers):
        made.add(failed=number < failed, seconds=seconds)
    return made


@pytest.mark.parametrize(
    ("candidate", "stable", "why"),
    [
        (tally(), tally(), ""),
        (tally(failed=1), tally(), ""),
        (tally(failed=2), tally(), "2 of its last 10 requests failed"),
        (tally(failed=2), tally(answers=0), "2 of its last 10 requests failed"),
        (tally(answers=9, failed=9), tally(), ""),
        (tally(failed=5), tally(failed=5), ""),
        (tally(seconds=0.2), tally(), ""),
        (tally(seconds=0.3), tally(), "its first byte comes after 0.3 s, that of the stable version after 0.1 s"),
        (tally(seconds=0.3), tally(answers=9), ""),
        (tally(seconds=0.3, answers=9), tally(), ""),
    ],
)
def test_the_verdict(candidate: Tally, stable: Tally, why: str) -> None:
    assert verdict(candidate, stable, GATES) == why


def test_only_the_last_answers_count() -> None:
    made = tally(answers=400, failed=400)
    for _ in range(600):
        made.add(failed=False, seconds=0.1)
    assert made.error_rate == 0


class Clock:
    now = 0.0

    def __call__(self) -> float:
        return self.now


class Judged:
    """A trial on one replica, its answers made by hand."""

    def __init__(self, replica: Replica, registry: Registry) -> None:
        self.replica = replica
        self.clock = Clock()
        self.trials = Trials(registry, blocking=replica.blocking, moved=replica.poll, clock=self.clock)

    async def answers(self, number: int, count: int, *, status: int = 200, seconds: float = 0.1) -> None:
        deployment = await self.replica.rollout.deployment(PROD)
        version = next(v for v in deployment.versions if v.record.version == number)
        for _ in range(count):
            sample = self.trials.sample(PROD, deployment, version)
            assert sample is not None
            send = sample.watching(self._send)
            self.clock.now += seconds
            await send({"type": "http.response.start", "status": status, "headers": []})
            await send({"type": "http.response.body", "body": b"x"})
            sample.end()
            sample.end()

    @staticmethod
    async def _send(message: Any) -> None:
        pass


@pytest.fixture
def judged(replica: Replica, registry: Registry, publish: Callable[..., Record]) -> Judged:
    publish(channel="prod")
    publish()
    rollouts.start(registry, name=NAME, channel="prod", candidate=2, weight=5, gates=GATES.to_plain(), who="ana")
    return Judged(replica, registry)


async def test_a_failing_candidate_goes_back_at_once_and_the_log_says_why(judged: Judged, registry: Registry) -> None:
    await judged.answers(1, 20)
    await judged.answers(2, 9, status=500)
    await judged.trials.settle()
    assert registry.channels(NAME)["prod"].seq == 2
    await judged.answers(2, 1, status=500)
    await judged.trials.settle()
    move = registry.channels(NAME)["prod"]
    assert (move.kind, move.main.version, move.who) == ("rollback", 1, WHO)
    assert move.why == "version 2: 10 of its last 10 requests failed"
    assert (await judged.replica.rollout.deployment(PROD)).versions[0].record.version == 1


async def test_a_slow_candidate_goes_back(judged: Judged, registry: Registry) -> None:
    await judged.answers(2, 10, seconds=0.5)
    await judged.trials.settle()
    assert registry.channels(NAME)["prod"].seq == 2, "there is nothing to measure it by yet"
    await judged.answers(1, 10)
    await judged.trials.settle()
    assert "first byte" in registry.channels(NAME)["prod"].why


async def test_mistakes_of_clients_are_none_of_the_versions(judged: Judged, registry: Registry) -> None:
    await judged.answers(2, 50, status=400)
    await judged.trials.settle()
    assert registry.channels(NAME)["prod"].seq == 2


async def test_somebody_else_was_first(judged: Judged, registry: Registry) -> None:
    await judged.answers(2, 9, status=500)
    rollouts.abort(registry, name=NAME, channel="prod", who="ana")
    await judged.answers(2, 1, status=500)
    await judged.trials.settle()
    assert [move.who for move in registry.channel_log(NAME, "prod")][:2] == ["ana", "ana"]


async def test_a_registry_that_is_away_is_asked_again(
    judged: Judged, registry: Registry, monkeypatch: pytest.MonkeyPatch
) -> None:
    def away(*args: object, **options: object) -> None:
        raise StorageError("the registry is away")

    with monkeypatch.context() as patch:
        patch.setattr(registry, "rollback", away)
        await judged.answers(2, 10, status=500)
        await judged.trials.settle()
    assert registry.channels(NAME)["prod"].seq == 2
    await judged.answers(2, 1, status=500)
    await judged.trials.settle()
    assert registry.channels(NAME)["prod"].kind == "rollback"


async def test_without_gates_nothing_moves_by_itself(judged: Judged, registry: Registry) -> None:
    registry.set_channel(NAME, "prod", {1: 90, 2: 10}, who="ana")
    await judged.replica.poll()
    await judged.answers(2, 50, status=500)
    await judged.trials.settle()
    assert registry.channels(NAME)["prod"].seq == 3


async def test_one_version_is_not_on_trial(judged: Judged) -> None:
    ref = AdapterRef.parse("acme/support@1")
    deployment = await judged.replica.rollout.deployment(ref)
    assert judged.trials.sample(ref, deployment, deployment.main) is None
