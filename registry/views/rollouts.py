"""Rollouts: a channel that gives a candidate a share of its callers. All that there is to know is the channel's log.

    seq   move              phase
    1     set 3
    2     set 3:95 4:5      running     start
    3     set 3:75 4:25     running     start, with more weight
    4     set 3             paused      pause: the same callers come back with the next start
    5     set 3:75 4:25     running
    6     set 4             promoted    promote
          rollback to 3     aborted     abort, or a server by itself when the candidate did not pass its `Gates`

`read` is the rule; the verbs read the log, and move the channel unless somebody else did meanwhile (Conflict).
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from typing import Literal

from adapterhub.errors import UsageError
from adapterhub.refs import AdapterName
from adapterhub.registry.base import ChannelMove, Registry, Target

Phase = Literal["none", "running", "paused", "promoted", "aborted"]


@dataclass(frozen=True)
class Gates:
    """What a candidate must pass, on each server by that server's own counts."""

    max_error_rate: float = 0.05  # of the candidate's requests; and no rollback while the stable version fails as often
    max_slowdown: float = 2.0  # median time to the first byte, over the stable version's
    min_requests: float = 20  # that a version must have answered before it is judged
    min_score: float | None = None  # mean over the server's prompts for the adapter; None: they are not asked

    def __post_init__(self) -> None:
        for name, value, is_right, wanted in (
            ("max-error-rate", self.max_error_rate, 0 <= self.max_error_rate <= 1, "a share from 0 to 1"),
            ("max-slowdown", self.max_slowdown, self.max_slowdown >= 1, "a factor from 1 up"),
            ("min-requests", self.min_requests, self.min_requests >= 1, "a number from 1 up"),
            ("min-score", self.min_score or 0, 0 <= (self.min_score or 0) <= 1, "a share from 0 to 1"),
        ):
            if not is_right or math.isnan(value):
                raise UsageError(f"--{name} {value} is no gate", why=f"it is {wanted}")

    @classmethod
    def of(cls, move: ChannelMove) -> Gates | None:
        """Those that were set with a move; None where there are none, or not all that it takes to judge."""
        known = {f.name: move.gates[f.name] for f in fields(cls) if f.name in move.gates}
        return cls(**known) if known.keys() >= _NEEDED else None

    def to_plain(self) -> dict[str, float]:
        return {name: value for name, value in asdict(self).items() if value is not None}


_NEEDED = {"max_error_rate", "max_slowdown", "min_requests"}


@dataclass(frozen=True)
class Trial:
    """Where a channel's rollout stands."""

    phase: Phase
    move: ChannelMove  # the newest
    stable: Target
    candidate: Target | None = None  # of the rollout that is running, or was the last thing to happen
    gates: Gates | None = None


def read(log: Sequence[ChannelMove]) -> Trial:
    """``log`` is newest first, as `Registry.channel_log` gives it."""
    move = log[0]
    if len(move.targets) > 1:
        stable = _stable(log)
        return Trial("running", move, stable, _candidate(move, stable), Gates.of(move))
    if len(log) > 1 and len(log[1].targets) > 1:
        before = read(log[1:])
        phase = _ended(move, before)
        if phase != "none":
            return Trial(phase, move, move.main, before.candidate, before.gates)
    return Trial("none", move, move.main)


def _stable(log: Sequence[ChannelMove]) -> Target:
    """The version that had the channel to itself before it was shared."""
    alone = next((move.main for move in log if len(move.targets) == 1), None)
    return next((t for t in log[0].targets if alone and t.version == alone.version), log[0].main)


def _candidate(move: ChannelMove, stable: Target) -> Target:
    return max((t for t in move.targets if t.version != stable.version), key=lambda t: t.version)


def _ended(move: ChannelMove, before: Trial) -> Phase:
    if before.candidate is not None and move.main.version == before.candidate.version:
        return "promoted"
    if move.main.version != before.stable.version:
        return "none"
    return "aborted" if move.kind == "rollback" else "paused"


def start(
    registry: Registry,
    *,
    name: AdapterName,
    channel: str,
    candidate: int,
    weight: int,
    gates: Mapping[str, float],
    who: str,
    why: str = "",
) -> ChannelMove:
    """Give ``candidate`` ``weight`` percent of the callers; call it again for more, or after a pause.

    ``gates`` are fields of `Gates`; those that are left out stay as they were. Raises UsageError, NotFound, Gone,
    Conflict.
    """
    trial = read(registry.channel_log(name, channel))
    stable, where = trial.stable.version, f"{name}@{channel}"
    if not 1 <= weight <= 99:
        raise UsageError(
            f"--weight {weight} is no share",
            why="it is a percentage from 1 to 99",
            hint=f"ah rollout promote {name} {channel}" if weight == 100 else "",
        )
    if candidate == stable:
        raise UsageError(f"{where} points at version {stable} already", hint=f"ah rollout status {name} {channel}")
    is_same = trial.candidate is not None and trial.candidate.version == candidate
    if trial.phase == "running" and not is_same:
        assert trial.candidate is not None
        raise UsageError(
            f"{where} tries version {trial.candidate.version} already",
            why="one candidate at a time",
            hint=f"ah rollout abort {name} {channel}",
        )
    kept = trial.gates.to_plain() if trial.gates and is_same and trial.phase in ("running", "paused") else {}
    return registry.set_channel(
        name,
        channel,
        {stable: 100 - weight, candidate: weight},
        who=who,
        why=why,
        expected=trial.move.seq,
        gates=Gates(**{**kept, **gates}).to_plain(),
    )


def promote(registry: Registry, *, name: AdapterName, channel: str, who: str, why: str = "") -> ChannelMove:
    """Give the candidate all callers; from a pause, too. Raises UsageError, Gone, Conflict."""
    trial = _expect(registry, name, channel, "running", "paused")
    assert trial.candidate is not None
    return registry.set_channel(
        name, channel, {trial.candidate.version: 100}, who=who, why=why, expected=trial.move.seq
    )


def pause(registry: Registry, *, name: AdapterName, channel: str, who: str, why: str = "") -> ChannelMove:
    """Give all callers back to the stable version, for now. Raises UsageError, Gone, Conflict."""
    trial = _expect(registry, name, channel, "running")
    return registry.set_channel(name, channel, {trial.stable.version: 100}, who=who, why=why, expected=trial.move.seq)


def abort(registry: Registry, *, name: AdapterName, channel: str, who: str, why: str = "") -> ChannelMove:
    """Give all callers back to the stable version, for good. Raises UsageError, Gone, Conflict."""
    trial = _expect(registry, name, channel, "running")
    return registry.rollback(name, channel, to=trial.stable.version, who=who, why=why, expected=trial.move.seq)


def _expect(registry: Registry, name: AdapterName, channel: str, *phases: Phase) -> Trial:
    trial = read(registry.channel_log(name, channel))
    if trial.phase not in phases:
        raise UsageError(
            f"{name}@{channel} has no rollout that is {' or '.join(phases)}",
            why=f"it points at version {trial.stable.version}"
            + (f"; the last rollout is {trial.phase}" if trial.phase != "none" else ""),
            hint=f"ah rollout start {name} {channel} VERSION --weight 5",
        )
    return trial
