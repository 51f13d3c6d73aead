"""Which versions of an adapter are kept, and why: rules that a team sets, applied to one adapter at a time.

    a channel points at it            kept, whatever the rules say
    among the newest N in use         kept; a yanked one that is newer than the oldest of these, too
    a channel pointed at it           kept for D days after the channel moved on
    else                              deleted: its record stays as a tombstone, its bytes go with the next collection

`decide` is the rule; `retain` applies it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from itertools import pairwise

from adapterhub.errors import UsageError
from adapterhub.refs import AdapterName
from adapterhub.registry.base import ChannelMove, Registry, Version
from adapterhub.registry.rules import GONE

_WHY = "the retention rules: {why}"


@dataclass(frozen=True)
class Policy:
    """What is kept beside what a channel points at now."""

    last: int  # versions in use, the newest
    days: float  # since a channel pointed at it

    def __post_init__(self) -> None:
        if self.last < 1 or not 0 <= self.days < 10**6:
            raise UsageError(
                "such rules would keep nothing that can be used, or are none",
                why=f"the last {self.last} versions, {self.days:g} days",
                hint="--last 10 --days 90",
            )


@dataclass(frozen=True)
class Decision:
    """What becomes of one version."""

    version: int
    keep: bool
    why: str
    size: int  # bytes of its files, some of which other versions may share


def decide(
    policy: Policy, versions: Sequence[Version], logs: Mapping[str, Sequence[ChannelMove]], *, now: datetime
) -> list[Decision]:
    """One decision for each version that is not deleted. ``versions`` and ``logs`` are newest first."""
    in_use = [v.record.version for v in versions if v.status not in GONE][: policy.last]
    oldest = min(in_use, default=0)
    present = {t.version: channel for channel, log in logs.items() if log for t in log[0].targets}
    left = _last_pointed(logs)

    def judge(version: Version) -> tuple[bool, str]:
        number = version.record.version
        if number in present:
            return True, f"the channel {present[number]} points at it"
        if number >= oldest:
            return True, f"among the last {policy.last} versions"
        if number in left:
            channel, when = left[number]
            days = (now - when) / timedelta(days=1)
            if days < policy.days:
                return True, f"the channel {channel} left it {days:.0f} days ago, less than {policy.days:g}"
            return False, f"not among the last {policy.last}, and the channel {channel} left it {days:.0f} days ago"
        return False, f"not among the last {policy.last}, and no channel ever pointed at it"

    return [Decision(v.record.version, *judge(v), v.record.manifest.size) for v in versions if v.status != "deleted"]


def _last_pointed(logs: Mapping[str, Sequence[ChannelMove]]) -> dict[int, tuple[str, datetime]]:
    """Version → the channel that left it last, and when."""
    left: dict[int, tuple[str, datetime]] = {}
    for channel, log in logs.items():
        for newer, move in pairwise(log):
            when = datetime.fromisoformat(newer.when)
            for target in move.targets:
                if target.version not in left or left[target.version][1] < when:
                    left[target.version] = channel, when
    return left


def retain(registry: Registry, name: AdapterName, policy: Policy, *, who: str, dry_run: bool = False) -> list[Decision]:
    """Decide, and delete what is not kept. Raises NotFound."""
    decisions = decide(policy, registry.versions(name), _logs(registry, name), now=datetime.now(UTC))
    if dry_run:
        return decisions
    return [one if one.keep else _delete(registry, name, one, who) for one in decisions]


def _delete(registry: Registry, name: AdapterName, decision: Decision, who: str) -> Decision:
    """Yanked first, so that no channel can be moved to it, then a look at where they are, then deleted."""
    why = _WHY.format(why=decision.why)
    before = registry.version(name, decision.version).status
    registry.set_status(name, decision.version, "yanked", who=who, why=why)
    for channel, move in registry.channels(name).items():
        if any(target.version == decision.version for target in move.targets):
            if before != "yanked":
                registry.set_status(name, decision.version, before, who=who, why=f"the channel {channel} moved to it")
            return Decision(decision.version, True, f"the channel {channel} was just moved to it", decision.size)
    registry.set_status(name, decision.version, "deleted", who=who, why=why)
    return decision


def _logs(registry: Registry, name: AdapterName) -> dict[str, list[ChannelMove]]:
    return {channel: registry.channel_log(name, channel) for channel in registry.channels(name)}
