"""The rules of versions and their statuses, whatever they are kept in: what may be used, what `latest` is. No I/O."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from adapterhub.errors import Conflict, Gone, NotFound, UsageError
from adapterhub.manifest import Record, canonical_json
from adapterhub.refs import AdapterName
from adapterhub.registry.base import ChannelMove, Evaluation, Status, StatusChange, Summary, Version
from adapterhub.registry.clock import now

GONE: tuple[Status, ...] = ("yanked", "deleted")


def with_status(record: Record, change: StatusChange | None) -> Version:
    """``change``: the newest of the version, None for one that was always active."""
    return Version(record, change.status, change.why) if change else Version(record)


def status_of(change: StatusChange | None) -> Status:
    return change.status if change else "active"


def usable(version: Version, *, asked: str) -> Version:
    """Raises Gone for a yanked or deleted one; ``asked`` is what its user typed."""
    if version.status in GONE:
        own = str(version.record.ref)
        raise Gone(
            f"{own} is {version.status}" if asked == own else f"{asked} is {own}, which is {version.status}",
            why=version.why,
            hint=f"ah ls {version.record.name}",
        )
    return version


def latest(name: AdapterName, numbers: Iterable[int], status: Callable[[int], Status]) -> int:
    """The highest number that is active. Raises Gone where none is."""
    for number in sorted(numbers, reverse=True):
        if status(number) == "active":
            return number
    raise none_active(name)


def none_active(name: AdapterName) -> Gone:
    return Gone(
        f"{name} has no active version",
        why="all of them are yanked, deprecated or deleted",
        hint=f"name a version (ah ls {name}), or publish one",
    )


def first_usable(found: Sequence[Version], *, asked: str) -> Version:
    """Of versions of one digest, newest first, the first in use. Raises Gone where none is."""
    in_use = [version for version in found if version.status not in GONE]
    return usable((in_use or found)[0], asked=asked)


def free_number(name: AdapterName, newest: int, wanted: int | None) -> int:
    """What the next version is numbered. Raises Conflict where ``wanted`` is not above the newest."""
    if wanted is not None and wanted <= newest:
        raise Conflict(
            f"{name}@{wanted} cannot be given",
            why=f"the newest version of {name} is {newest}, and numbers only grow",
            hint="leave the number to the registry",
        )
    return newest + 1 if wanted is None else wanted


def next_status(
    name: AdapterName, version: int, current: StatusChange | None, status: Status, *, who: str, why: str
) -> StatusChange:
    """The change to append; ``current`` itself where nothing changes. Raises Gone for a deleted version."""
    if current is not None and current.status == status:
        return current
    if current is not None and current.status == "deleted":
        raise Gone(f"{name}@{version} is deleted", why="that is final", hint=f"ah ls {name}")
    return StatusChange((current.seq if current else 0) + 1, status, why, who, now())


def next_evaluation(
    version: Version, newest: int, *, suite: str, metrics: Mapping[str, float], details: Mapping[str, Any], who: str
) -> Evaluation:
    """What to append after evaluation ``newest`` (0: none yet).

    Raises Gone for a deleted version, UsageError for what is no measurement.
    """
    ref = version.record.ref
    if version.status == "deleted":
        raise Gone(f"{ref} is deleted", why=version.why, hint=f"ah ls {ref.name}")
    if not suite.strip():
        raise UsageError(f"an evaluation of {ref} has no name", why="it is told apart from others by its suite")
    plain = {metric: float(value) for metric, value in metrics.items()}
    if wrong := [metric for metric, value in plain.items() if not math.isfinite(value)]:
        raise UsageError(
            f"the metrics of {suite} are no numbers", why=f"{', '.join(wrong)} is NaN or infinite", hint="leave it out"
        )
    try:
        canonical_json(details)
    except (TypeError, ValueError) as error:
        raise UsageError(
            f"the details of {suite} cannot be stored", why=str(error), hint="hand in plain JSON"
        ) from error
    return Evaluation(newest + 1, suite, plain, dict(details), who, now())


def moved(name: AdapterName, channel: str, move: ChannelMove | None) -> Conflict:
    """What a mover is told who came too late; ``move`` is the newest."""
    is_now = f"it is now at {name}@{move.main.version}, moved by {move.who}" if move else "it has no moves yet"
    return Conflict(
        f"the channel {channel!r} of {name} moved meanwhile",
        why=is_now,
        hint=f"look at `ah channel log {name} {channel}`, then type the command again, or with --force",
    )


def no_channel(name: AdapterName, channel: str) -> NotFound:
    return NotFound(f"{name} has no channel {channel!r}", hint=f"ah show {name}")


def no_version(name: AdapterName, version: int | str) -> NotFound:
    said = f"version {version}" if isinstance(version, int) else f"version with digest {version}"
    return NotFound(f"{name} has no {said}", hint=f"ah ls {name}")


def newest_measured(evaluations: Sequence[Evaluation]) -> dict[str, Mapping[str, float]]:
    """Suite → metrics; of a suite that was run several times, the newest. ``evaluations`` is newest first."""
    return {evaluation.suite: evaluation.metrics for evaluation in reversed(evaluations)}


def summary(version: Version, evaluations: Sequence[Evaluation] = ()) -> Summary:
    """A version as lists show it; ``evaluations`` of it, newest first."""
    record, manifest = version.record, version.record.manifest
    return Summary(
        name=record.name,
        version=record.version,
        digest=record.digest,
        status=version.status,
        created=record.created,
        author=record.author,
        size=manifest.size,
        rank=manifest.lora.rank,
        base=manifest.base.name if manifest.base else "",
        method=manifest.lineage.method,
        parents=manifest.lineage.parents,
        labels=record.labels,
        metrics=manifest.lineage.metrics,
        evaluations=newest_measured(evaluations),
    )


def tenant_gone(tenant: str) -> Gone:
    return Gone(f"the tenant {tenant!r} was deleted", why="a deleted name is never issued again", hint="ah ls")
