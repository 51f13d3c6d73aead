"""The phase of a rollout, told from the channel's log, and the verbs that move it."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path

import pytest

from adapterhub.errors import Conflict, UsageError
from adapterhub.refs import AdapterName
from adapterhub.registry import Registry, open_registry
from adapterhub.registry.views import rollouts
from adapterhub.registry.views.rollouts import Gates, abort, pause, promote, read, start

Drafts = Callable[..., object]
WHERE = {"channel": "prod", "who": "ana"}


@pytest.fixture
def registry(tmp_path: Path) -> Registry:
    """Of one kind: what these rules ask of a registry is in the contract."""
    return open_registry(f"memory://{tmp_path}")


@pytest.fixture
def channel(registry: Registry, new_draft: Drafts, name: AdapterName) -> Registry:
    """Versions 1 to 3; ``prod`` is 1."""
    for _ in range(3):
        registry.publish(new_draft(), name=name, author="ana")  # type: ignore[arg-type]
    registry.set_channel(name, "prod", {1: 100}, who="ana")
    return registry


def stands(registry: Registry, name: AdapterName) -> tuple[str, dict[int, int]]:
    trial = read(registry.channel_log(name, "prod"))
    return trial.phase, {target.version: target.weight for target in trial.move.targets}


def test_from_a_few_callers_to_all(channel: Registry, name: AdapterName) -> None:
    assert stands(channel, name) == ("none", {1: 100})
    start(channel, name=name, candidate=2, weight=5, gates={"max_error_rate": 0.5}, **WHERE)
    assert stands(channel, name) == ("running", {1: 95, 2: 5})
    start(channel, name=name, candidate=2, weight=60, gates={"max_slowdown": 3}, **WHERE)
    trial = read(channel.channel_log(name, "prod"))
    assert trial.candidate is not None and trial.candidate.version == 2
    assert trial.stable.version == 1, "whoever has more callers"
    assert trial.gates == Gates(max_error_rate=0.5, max_slowdown=3), "what was not said stays"
    promote(channel, name=name, **WHERE)
    assert stands(channel, name) == ("promoted", {2: 100})
    channel.set_channel(name, "prod", {3: 100}, who="ana")
    assert stands(channel, name) == ("none", {3: 100})


def test_a_pause_keeps_the_gates_and_goes_on(channel: Registry, name: AdapterName) -> None:
    start(channel, name=name, candidate=2, weight=25, gates={"min_requests": 7}, **WHERE)
    pause(channel, name=name, **WHERE)
    assert stands(channel, name) == ("paused", {1: 100})
    with pytest.raises(UsageError, match=r"no rollout that is running: .* is paused"):
        abort(channel, name=name, **WHERE)
    start(channel, name=name, candidate=2, weight=50, gates={}, **WHERE)
    assert read(channel.channel_log(name, "prod")).gates == Gates(min_requests=7)
    pause(channel, name=name, **WHERE)
    promote(channel, name=name, **WHERE)
    assert stands(channel, name)[1] == {2: 100}


def test_an_abort_goes_to_the_stable_version_and_not_to_a_smaller_share(channel: Registry, name: AdapterName) -> None:
    for weight in (5, 25, 75):
        start(channel, name=name, candidate=2, weight=weight, gates={}, **WHERE)
    move = abort(channel, name=name, why="rude", **WHERE)
    assert (move.kind, move.main.version, move.why) == ("rollback", 1, "rude")
    assert stands(channel, name) == ("aborted", {1: 100})
    start(channel, name=name, candidate=3, weight=5, gates={}, **WHERE)
    assert stands(channel, name) == ("running", {1: 95, 3: 5})


def test_an_older_version_may_be_the_candidate(channel: Registry, name: AdapterName) -> None:
    channel.set_channel(name, "prod", {3: 100}, who="ana")
    start(channel, name=name, candidate=1, weight=90, gates={}, **WHERE)
    trial = read(channel.channel_log(name, "prod"))
    assert trial.candidate is not None
    assert (trial.stable.version, trial.candidate.version) == (3, 1)


def test_what_cannot_be_started(channel: Registry, name: AdapterName) -> None:
    for weight in (0, 100, -5, 101):
        with pytest.raises(UsageError, match="no share"):
            start(channel, name=name, candidate=2, weight=weight, gates={}, **WHERE)
    with pytest.raises(UsageError, match="points at version 1 already"):
        start(channel, name=name, candidate=1, weight=5, gates={}, **WHERE)
    start(channel, name=name, candidate=2, weight=5, gates={}, **WHERE)
    with pytest.raises(UsageError, match="tries version 2 already"):
        start(channel, name=name, candidate=3, weight=5, gates={}, **WHERE)


@pytest.mark.parametrize(
    "gates",
    [{"max_error_rate": -0.1}, {"max_error_rate": 5}, {"max_error_rate": math.nan}, {"max_slowdown": 0.5},
     {"max_slowdown": math.nan}, {"min_requests": 0}],
)  # fmt: skip
def test_gates_that_are_none(gates: dict[str, float]) -> None:
    with pytest.raises(UsageError, match="is no gate"):
        Gates(**gates)


@pytest.mark.parametrize("verb", [promote, pause, abort])
def test_nothing_to_end(channel: Registry, name: AdapterName, verb: Callable[..., object]) -> None:
    with pytest.raises(UsageError, match="no rollout"):
        verb(channel, name=name, **WHERE)


def test_of_two_servers_that_go_back_one_does(channel: Registry, name: AdapterName) -> None:
    """Both judged the same move. A second rollback would go one deployment too far."""
    seq = start(channel, name=name, candidate=2, weight=5, gates={}, **WHERE).seq
    channel.rollback(name, "prod", to=1, who="one", expected=seq)
    with pytest.raises(Conflict, match="moved by one"):
        channel.rollback(name, "prod", to=1, who="two", expected=seq)
    assert stands(channel, name) == ("aborted", {1: 100})


def test_moves_without_gates_are_read(channel: Registry, name: AdapterName) -> None:
    channel.set_channel(name, "prod", {1: 50, 2: 50}, who="ana")
    trial = read(channel.channel_log(name, "prod"))
    assert (trial.phase, trial.gates) == ("running", None)
    channel.set_channel(name, "prod", {1: 50, 2: 50}, who="ana", gates={"of_the_future": 1.0})
    assert rollouts.read(channel.channel_log(name, "prod")).gates is None
