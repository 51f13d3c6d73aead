"""A version goes from one registry to another: the same bytes, the same digest, and all that came to it since.

    copy     one version, under the next number there (or its own)      promotion from dev to prod
    mirror   whole tenants, one way, same numbers                       `mirror`

A copy that was broken off is finished by the same call again: a version that is there already is found by its digest,
and only what is missing is added. Bytes go through a verified folder, and only where the target lacks the version.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from adapterhub.errors import Conflict, NotFound
from adapterhub.manifest import Record
from adapterhub.refs import AdapterName
from adapterhub.registry.base import Draft, Evaluation, Progress, Registry, Signature, Version

Files = Callable[[Record], Path]  # a verified folder with a version's files


@dataclass(frozen=True)
class Original:
    """A version as it stands in one registry: what a copy takes along."""

    version: Version
    evaluations: tuple[Evaluation, ...]  # oldest first
    signatures: tuple[Signature, ...]

    @property
    def record(self) -> Record:
        return self.version.record


@dataclass(frozen=True)
class Landed:
    """Where a copy is, and what had to be done for it."""

    record: Record  # in the target
    is_new: bool  # else it was there
    evaluations: int = 0  # that were added
    signatures: int = 0


def original(registry: Registry, version: Version) -> Original:
    """Raises StorageError, IntegrityError."""
    record = version.record
    evaluations = registry.evaluations(record.name, record.version)
    return Original(version, tuple(reversed(evaluations)), tuple(registry.signatures(record)))


def land(
    one: Original,
    files: Files,
    target: Registry,
    *,
    name: AdapterName | None = None,
    number: int | None = None,
    progress: Progress | None = None,
) -> Landed:
    """Make ``one`` a version of ``name`` in ``target``, unless it is there.

    Raises:
        Conflict: ``number`` is taken by another content, or is below the newest.
        Gone: it is there, but yanked or deleted.
    """
    name = name or one.record.name
    found = _found(target, name, one.record.digest, number)
    if found is None:
        record = _publish(one, files(one.record), target, name, number, progress)
        if one.version.status == "deprecated":
            target.set_status(name, record.version, "deprecated", who=one.record.author, why=one.version.why)
    else:
        record = found
    evaluations, signatures = _catch_up(one, target, record)
    return Landed(record, found is None, evaluations, signatures)


def point(target: Registry, record: Record, channel: str, *, who: str, why: str = "") -> None:
    """Point a channel at a version, unless it points there: a copy made again leaves no trace in the log."""
    move = target.channels(record.name).get(channel)
    if move is None or [(t.version, t.weight) for t in move.targets] != [(record.version, 100)]:
        target.set_channel(record.name, channel, {record.version: 100}, who=who, why=why)


def _found(target: Registry, name: AdapterName, digest: str, number: int | None) -> Record | None:
    try:
        if number is None:
            return target.resolve(name.at(digest)).record
        there = target.version(name, number).record
    except NotFound:
        return None
    if there.digest != digest:
        raise Conflict(
            f"{there.ref} is another version in {target.url}",
            why=f"there it has the digest {there.digest[:19]}…, here {digest[:19]}…",
            hint="copy it without --same-number, or under another --name",
        )
    return there


def _publish(
    one: Original, folder: Path, target: Registry, name: AdapterName, number: int | None, progress: Progress | None
) -> Record:
    draft = Draft(folder, one.record.manifest, one.record.verdicts)
    return target.publish(
        draft, name=name, author=one.record.author, labels=one.record.labels, number=number, progress=progress
    )


def _catch_up(one: Original, target: Registry, record: Record) -> tuple[int, int]:
    """Add the evaluations and signatures that the copy lacks; how many of each."""
    there = [_content(e) for e in target.evaluations(record.name, record.version)] if one.evaluations else []
    added = 0
    for evaluation in one.evaluations:
        if _content(evaluation) in there:
            there.remove(_content(evaluation))
            continue
        target.add_evaluation(
            record.name,
            record.version,
            suite=evaluation.suite,
            metrics=evaluation.metrics,
            details=evaluation.details,
            who=evaluation.who,
        )
        added += 1
    keys = {signature.key for signature in target.signatures(record)} if one.signatures else set()
    missing = [signature for signature in one.signatures if signature.key not in keys]
    for signature in missing:
        target.add_signature(record, signature)
    return added, len(missing)


def _content(evaluation: Evaluation) -> tuple[object, ...]:
    """What makes two evaluations the same: not their number and time, which each registry gives."""
    return evaluation.suite, dict(evaluation.metrics), dict(evaluation.details), evaluation.who
