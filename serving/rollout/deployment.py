"""What a reference means at one moment: its versions and their weights, as the registry has them."""

from __future__ import annotations

from dataclasses import dataclass

from adapterhub.errors import Gone, IntegrityError, NotFound
from adapterhub.refs import LATEST, AdapterRef
from adapterhub.registry.base import ChannelMove, Registry, Version
from adapterhub.registry.views import rollouts
from adapterhub.registry.views.rollouts import Gates
from adapterhub.serving.rollout.canary import Share


@dataclass(frozen=True)
class Deployment:
    """One version with all callers, or several that share them."""

    shares: tuple[Share, ...]
    seq: int = 0  # of the channel's move
    candidate: int | None = None  # the version that is on trial
    gates: Gates | None = None
    move: ChannelMove | None = None  # that made it so; None where the reference is no channel

    @property
    def main(self) -> Version:
        """The version with the largest weight."""
        return max(self.shares, key=lambda share: share[1])[0]

    @property
    def versions(self) -> tuple[Version, ...]:
        return tuple(version for version, _ in self.shares)

    @property
    def stable(self) -> Version | None:
        """What the candidate is measured against, and a rollback goes to. None where nothing is on trial."""
        others = [version for version in self.versions if version.record.version != self.candidate]
        return others[0] if self.candidate is not None and len(others) == 1 and len(self.versions) == 2 else None

    @property
    def until_scored(self) -> Deployment:
        """What is served until the candidate has been scored, where its gates ask for that: the stable version."""
        if self.stable is None or self.gates is None or self.gates.min_score is None:
            return self
        return Deployment(((self.stable, 100),), seq=self.seq)

    def __str__(self) -> str:
        if len(self.shares) == 1:
            return str(self.main.record.ref)
        return " ".join(f"{version.record.ref}:{weight}%" for version, weight in self.shares)

    def is_as(self, other: Deployment) -> bool:
        """Whether callers get the same versions, whatever was said of them since."""
        return self._key == other._key

    @property
    def _key(self) -> list[tuple[AdapterRef, int]]:
        return [(version.record.ref, weight) for version, weight in self.shares]

    def contradicts(self, known: Deployment) -> bool:
        """Whether a version has other bytes than before. No registry does that; a new one in its place may."""
        digests = {version.record.ref: version.record.digest for version in known.versions}
        return any(digests.get(v.record.ref, v.record.digest) != v.record.digest for v in self.versions)


def read_deployment(registry: Registry, ref: AdapterRef) -> Deployment:
    """What ``ref`` means now. Blocking.

    A version that was yanked gives its share to the others. Raises NotFound, Gone where none is left, StorageError.
    """
    if ref.channel in (None, LATEST):
        return Deployment(((registry.resolve(ref), 100),))
    last = registry.channel_log(ref.name, str(ref.channel), limit=1)[0]
    if len(last.targets) == 1:
        version = registry.resolve(ref)
        is_of_it = version.record.version == last.main.version  # and not of one that came between the two looks
        return Deployment(((version, 100),), seq=last.seq, move=last if is_of_it else None)
    trial = rollouts.read(registry.channel_log(ref.name, str(ref.channel)))
    shares: list[Share] = []
    refusal: Gone | None = None
    for target in trial.move.targets:
        try:
            version = registry.resolve(ref.name.at(target.version))
        except Gone as error:
            refusal = error
            continue
        if version.record.digest != target.digest:
            raise IntegrityError(f"{version.record.ref} is not what {ref} was pointed at", why="its digest differs")
        shares.append((version, target.weight))
    if not shares:
        raise refusal or NotFound(f"{ref} points at nothing")
    candidate = trial.candidate.version if trial.candidate is not None else None
    return Deployment(tuple(shares), seq=trial.move.seq, candidate=candidate, gates=trial.gates, move=trial.move)
