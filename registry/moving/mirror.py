"""A registry follows another, one way: versions with their numbers, statuses, channels, evaluations and signatures.

    source  ──►  target        only what is missing is sent; called again, it goes on

The target belongs to the mirror, but for channels that the source does not have. Where somebody wrote other versions
there, or moved a mirrored channel, the adapter is refused whole, before anything of it is written.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, fields

from adapterhub.errors import Conflict, Gone, NotFound
from adapterhub.refs import AdapterName
from adapterhub.registry.base import ChannelMove, Progress, Registry, Version
from adapterhub.registry.moving.copying import Files, land, original

_THREADS = 8  # adapters at once

Done = Callable[[Version], None]  # told each version that was sent


@dataclass
class Report:
    """What a mirroring did."""

    versions: int = 0
    statuses: int = 0
    channels: int = 0
    evaluations: int = 0
    signatures: int = 0
    notes: list[str] = field(default_factory=list)  # what could not be the same there, and why
    refused: list[str] = field(default_factory=list)  # adapters whose target has diverged, and why

    def __add__(self, other: Report) -> Report:
        return Report(*(getattr(self, f.name) + getattr(other, f.name) for f in fields(self)))

    @property
    def changed(self) -> int:
        return self.versions + self.statuses + self.channels + self.evaluations + self.signatures


def mirror(
    source: Registry,
    target: Registry,
    tenants: Iterable[str] | None = None,
    *,
    files: Files,
    done: Done | None = None,
    progress: Progress | None = None,
) -> Report:
    """Bring ``target`` to where ``source`` is. ``files`` gives a verified folder of a version of ``source``.

    Raises NotFound for a tenant that the source does not have, StorageError, IntegrityError.
    """
    known = source.tenants()
    wanted = known if tenants is None else list(tenants)
    for tenant in wanted:
        if tenant not in known:
            raise NotFound(f"there is no tenant {tenant!r} in {source.url}", hint="ah ls")

    def bring(name: AdapterName) -> Report:
        report = Report()
        try:
            _Adapter(source, target, name, report).bring(files, done, progress)
        except Conflict as error:
            report.refused.append(f"{name}: {error}")
        return report

    names = [name for tenant in wanted for name in source.adapters(tenant)]
    with ThreadPoolExecutor(_THREADS, thread_name_prefix="mirror") as pool:
        return sum(pool.map(bring, names), Report())


class _Adapter:
    """One adapter on both sides."""

    def __init__(self, source: Registry, target: Registry, name: AdapterName, report: Report) -> None:
        self.source, self.target, self.name, self.report = source, target, name, report
        self.wanted = {v.record.version: v for v in source.versions(name)}
        self.there = _there(target, name)
        self.moves = source.channels(name)
        self.moves_there = target.channels(name) if self.there else {}
        check_versions(name, self.wanted, self.there)
        for channel, move in self.moves.items():
            self._check_channel(channel, move)

    def bring(self, files: Files, done: Done | None, progress: Progress | None) -> None:
        for number in sorted(self.wanted):
            self._bring_version(number, files, done, progress)
        for channel, move in self.moves.items():
            self._bring_channel(channel, move)

    def _bring_version(self, number: int, files: Files, done: Done | None, progress: Progress | None) -> None:
        version, there = self.wanted[number], self.there.get(number)
        if there is None and version.status == "deleted":
            self.report.notes.append(f"{self.name}@{number} was deleted before it could be mirrored")
        elif there is not None and there.status == "deleted" != version.status:
            self.report.notes.append(f"{self.name}@{number} is deleted in the target, which is final")
        elif version.status == "deleted":
            self._bring_status(version, there)
        else:
            landed = land(original(self.source, version), files, self.target, number=number, progress=progress)
            self.report.versions += landed.is_new
            self.report.evaluations += landed.evaluations
            self.report.signatures += landed.signatures
            self._bring_status(version, there or self.target.version(self.name, number))
            if landed.is_new and done:
                done(version)

    def _bring_status(self, version: Version, there: Version | None) -> None:
        if there is None or there.status == version.status:
            return
        number = version.record.version
        who = self.source.status_log(self.name, number)[0].who
        self.target.set_status(self.name, number, version.status, who=who, why=version.why)
        self.report.statuses += 1

    def _check_channel(self, channel: str, move: ChannelMove) -> None:
        there = self.moves_there.get(channel)
        if there is None or pointing(there) == pointing(move):
            return
        if pointing(there) not in [pointing(earlier) for earlier in self.source.channel_log(self.name, channel)]:
            raise Conflict(
                f"the channel {channel!r} was moved in the target",
                why=f"there it points at version {there.main.version}, by {there.who}; it never did in the source",
            )

    def _bring_channel(self, channel: str, move: ChannelMove) -> None:
        there = self.moves_there.get(channel)
        if there is not None and pointing(there) == pointing(move):
            return
        seq = there.seq if there else 0
        try:
            self.target.set_channel(self.name, channel, pointing(move), who=move.who, why=move.why, expected=seq)
        except (NotFound, Gone) as error:
            self.report.notes.append(f"the channel {channel!r} of {self.name} stays where it is: {error}")
        else:
            self.report.channels += 1


def check_versions(name: AdapterName, wanted: Mapping[int, Version], there: Mapping[int, Version]) -> None:
    """Raises Conflict where the target has what the source has not, or something else under its number."""
    for number, version in sorted(there.items()):
        if number not in wanted:
            raise Conflict(f"{name}@{number} is in the target alone", why="somebody published it there")
        if wanted[number].record.digest != version.record.digest:
            raise Conflict(
                f"{name}@{number} is another version in the target",
                why=f"there it has the digest {version.record.digest[:19]}…",
            )


def pointing(move: ChannelMove) -> dict[int, int]:
    """Version → weight in percent."""
    return {target.version: target.weight for target in move.targets}


def _there(target: Registry, name: AdapterName) -> dict[int, Version]:
    try:
        return {v.record.version: v for v in target.versions(name)}
    except NotFound:
        return {}
