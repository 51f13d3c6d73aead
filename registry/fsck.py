"""Looks at everything in a registry, and says what is broken and what to do about it. Changes nothing.

    records    each against its digest and its name         one by one: a broken one does not hide the others
    files      each against its sha256, once a blob          in parallel
    logs       statuses, channel moves, evaluations          readable, contiguous, pointing at versions that are there
    signatures whole, over the digest, of the key they name  `ah signatures` asks the key itself
    digests    each version is found by its digest           what `acme/support@sha256:…` asks

Only `base.Registry` is used, so it works for every kind of registry.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import TypeVar

from adapterhub.errors import AdapterHubError, Gone, IntegrityError, NotFound, Unsupported
from adapterhub.manifest import FileEntry, Record
from adapterhub.refs import AdapterName
from adapterhub.registry.base import ChannelMove, Progress, Registry, Version
from adapterhub.registry.logs import Numbered
from adapterhub.registry.signing import flaw

T = TypeVar("T")

_BROKEN = (IntegrityError, NotFound, Unsupported, Gone)  # findings; what else may be raised is no property of the data


@dataclass(frozen=True)
class Problem:
    """One thing that is not as it should be."""

    where: str  # "acme/support@3", "acme/support channel prod"
    what: str
    next: str  # what to do


@dataclass
class Report:
    """What was looked at, and what was found."""

    adapters: int = 0
    versions: int = 0
    files: int = 0  # blobs: each is read once, however many versions have it
    size: int = 0  # bytes that were read
    problems: list[Problem] = field(default_factory=list)

    @property
    def is_clean(self) -> bool:
        return not self.problems


def fsck(
    registry: Registry,
    names: Iterable[AdapterName] | None = None,
    *,
    threads: int = 8,
    progress: Progress | None = None,
) -> Report:
    """Check these adapters, or all. Raises NotFound for an adapter that is not there, StorageError."""
    report = Report()
    # Small files of a folder are Python's own work: threads would take turns at it, and wait for each turn.
    readers = 1 if registry.url.startswith(("file:", "memory:")) else threads
    with ThreadPoolExecutor(readers) as logs, ThreadPoolExecutor(threads) as hashing:
        blobs = _Blobs(registry, hashing, progress)
        for name in names if names is not None else _all(registry, report):
            report.adapters += 1
            _check_adapter(registry, name, report, blobs, logs)
    report.problems.sort(key=lambda problem: problem.where)
    return report


def _all(registry: Registry, report: Report) -> list[AdapterName]:
    todo = "remove what does not belong there, then check again: until then nothing can be listed"
    tenants = _tried(registry.tenants, where=registry.url, todo=todo, report=report) or []
    return [name for tenant in tenants for name in registry.adapters(tenant)]


def _check_adapter(
    registry: Registry, name: AdapterName, report: Report, blobs: _Blobs, pool: ThreadPoolExecutor
) -> None:
    versions = _versions(registry, name, report)
    report.versions += len(versions)
    for checked in [pool.submit(_check_version, registry, v.record, report) for v in versions.values()]:
        checked.result()
    blobs.check([v.record for v in versions.values() if v.status != "deleted"], report)  # else they may be gone
    _check_digests(registry, versions.values(), report)
    _check_channels(registry, name, versions, report)


def _versions(registry: Registry, name: AdapterName, report: Report) -> dict[int, Version]:
    """Number → version, without those that cannot be read."""
    try:
        return {v.record.version: v for v in registry.versions(name)}
    except _BROKEN:
        pass  # one by one, to name it
    found = {}
    try:
        numbers = registry.numbers(name)
    except IntegrityError as error:
        report.problems.append(Problem(str(name), str(error), "remove what does not belong there"))
        return {}
    for number in numbers:
        todo = "restore its record from a copy of the registry"
        version = _tried(registry.version, name, number, where=f"{name}@{number}", todo=todo, report=report)
        if version is not None:
            found[number] = version
    return found


def _check_version(registry: Registry, record: Record, report: Report) -> None:
    _check_log(registry.status_log, record, f"{record.ref} status", report)
    _check_log(registry.evaluations, record, f"{record.ref} evaluations", report)
    for signature in registry.signatures(record):
        if wrong := flaw(record.manifest, signature):
            where = f"{record.ref} signature {signature.key[:12]}"
            report.problems.append(Problem(where, wrong, "remove it from the registry, then sign again: `ah sign`"))


def _check_log(
    read: Callable[[AdapterName, int], Sequence[Numbered]], record: Record, where: str, report: Report
) -> None:
    todo = "restore its log from a copy of the registry"
    log = _tried(read, record.name, record.version, where=where, todo=todo, report=report)
    _check_contiguous([entry.seq for entry in log or ()], where, report)


def _check_digests(registry: Registry, versions: Iterable[Version], report: Report) -> None:
    usable = {v.record.digest: v.record for v in versions if v.status in ("active", "deprecated")}
    for digest, record in usable.items():
        where = f"{record.ref} digest"
        todo = f"publish it again: `ah pull {record.ref} --to DIR`, then `ah publish DIR --name {record.name}`"
        found = _tried(registry.resolve, record.name.at(digest), where=where, todo=todo, report=report)
        if found is not None and found.record.digest != digest:
            report.problems.append(Problem(where, f"its digest finds {found.record.ref}, which has another", todo))


def _check_channels(registry: Registry, name: AdapterName, versions: dict[int, Version], report: Report) -> None:
    todo = f"look at `ah channel log {name} CHANNEL` of each, and set the broken one again"
    channels = _tried(registry.channels, name, where=f"{name} channels", todo=todo, report=report)
    for channel in channels or ():
        where = f"{name} channel {channel}"
        todo = f"set it again: `ah channel set {name} {channel} VERSION`"
        log = _tried(registry.channel_log, name, channel, where=where, todo=todo, report=report)
        _check_contiguous([move.seq for move in log or ()], where, report)
        for problem in _dangling(log[0], versions) if log else ():
            report.problems.append(Problem(where, problem, todo))


def _dangling(move: ChannelMove, versions: dict[int, Version]) -> Iterator[str]:
    for target in move.targets:
        version = versions.get(target.version)
        if version is None:
            yield f"it points at version {target.version}, which is not there or cannot be read"
        elif version.record.digest != target.digest:
            yield f"it points at version {target.version} with another digest than that version has"
        elif version.status == "deleted":
            yield f"it points at version {target.version}, which is deleted"


def _check_contiguous(newest_first: Sequence[int], where: str, report: Report) -> None:
    if list(newest_first) != list(range(len(newest_first), 0, -1)):
        what = f"its log has the entries {sorted(newest_first)}, not each number from 1"
        report.problems.append(Problem(where, what, "restore the missing entries from a copy of the registry"))


def _tried(read: Callable[..., T], *arguments: object, where: str, todo: str, report: Report) -> T | None:
    try:
        return read(*arguments)
    except _BROKEN as error:
        report.problems.append(Problem(where, str(error), _upgrade(error) or todo))
        return None


def _upgrade(error: AdapterHubError) -> str:
    return f"`{error.hint}`" if isinstance(error, Unsupported) else ""


class _Blobs:
    """Files are hashed, each content of a tenant once."""

    def __init__(self, registry: Registry, pool: ThreadPoolExecutor, progress: Progress | None) -> None:
        self._registry = registry
        self._pool = pool
        self._progress = progress
        self._found: dict[tuple[str, str, str], str] = {}  # where the bytes are → what is wrong, empty where nothing is

    def check(self, records: Sequence[Record], report: Report) -> None:
        """Raises StorageError where the registry went away."""
        files = [(record, file) for record in records for file in record.manifest.files]
        new = {_key(*one): one for one in files if _key(*one) not in self._found}
        for (key, (_, file)), wrong in zip(new.items(), self._pool.map(self._check, new.values()), strict=True):
            self._found[key] = wrong
            report.files += 1
            report.size += file.size
        for record, file in files:
            if wrong := self._found[_key(record, file)]:
                todo = "restore the file from a copy of the registry, or yank the version and publish it again"
                report.problems.append(Problem(f"{record.ref} {file.path}", wrong, todo))

    def _check(self, one: tuple[Record, FileEntry]) -> str:
        record, file = one
        try:
            self._registry.check_file(record, file.path)
        except (IntegrityError, NotFound) as error:
            return error.why or error.what
        if self._progress:
            self._progress(file.size)
        return ""


def _key(record: Record, file: FileEntry) -> tuple[str, str, str]:
    return record.name.tenant, file.sha256, record.epochs.get(file.sha256, "")
