"""What happened to a reference on this server, for those who want to be told. Pure.

flip              the name means another version from now on
canary.start      a candidate gets a share of the callers
canary.step       another share
canary.promote    all of them
canary.pause      none, for now
canary.rollback   none, by a person or because it did worse (``why``)
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from typing import Any, Literal

from adapterhub.refs import AdapterRef
from adapterhub.serving.rollout.deployment import Deployment

Kind = Literal["flip", "canary.start", "canary.step", "canary.promote", "canary.pause", "canary.rollback"]


@dataclass(frozen=True)
class Event:
    """One change of what a reference means."""

    kind: Kind
    ref: AdapterRef
    before: Deployment
    after: Deployment

    @property
    def id(self) -> str:
        """The same on every server that saw the same move, so that a receiver can tell that it had it already."""
        text = "\0".join(
            [self.kind, str(self.ref), str(self.after.seq), *(v.record.digest for v in self.after.versions)]
        )
        return hashlib.sha256(text.encode()).hexdigest()[:32]

    def to_plain(self) -> dict[str, Any]:
        move = self.after.move
        return {
            "id": self.id,
            "event": self.kind,
            "reference": str(self.ref),
            "from": _shares(self.before),
            "to": _shares(self.after),
            "candidate": self.after.candidate or self.before.candidate,
            "seq": self.after.seq or None,
            "who": move.who if move else None,
            "why": (move.why if move else "") or None,
        }


def event_of(ref: AdapterRef, before: Deployment, after: Deployment) -> Event:
    """What it is that happened when ``ref`` went from one meaning to another."""
    return Event(_kind(before, after), ref, before, after)


def _kind(before: Deployment, after: Deployment) -> Kind:
    if after.candidate is not None:
        return "canary.step" if before.candidate == after.candidate else "canary.start"
    if before.candidate is None:
        return "flip"
    if after.main.record.version == before.candidate:
        return "canary.promote"
    return "canary.rollback" if after.move is not None and after.move.kind == "rollback" else "canary.pause"


def _shares(deployment: Deployment) -> dict[str, int]:
    """Version → percent of the callers."""
    return {str(version.record.ref): weight for version, weight in deployment.shares}
