"""The part of the admin API that tries a candidate on a channel: the verbs of `registry.views.rollouts`, and counts.

For keys with the scope ``channels``, on channels of their own adapters; a move is followed here before it is answered.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

from fastapi import APIRouter, Request
from pydantic import BaseModel, ConfigDict, Field

from adapterhub.errors import UsageError
from adapterhub.manifest import to_plain
from adapterhub.refs import LATEST, AdapterRef
from adapterhub.registry import ChannelMove
from adapterhub.registry.views import rollouts
from adapterhub.serving.replica import Replica
from adapterhub.serving.tenancy import not_found
from adapterhub.serving.tenants.callers import CALLER, SINGLE_USER, Caller

router = APIRouter(prefix="/adapterhub/rollout", tags=["rollouts"])


class Channel(BaseModel):
    """A channel, and a word for its log."""

    model_config = ConfigDict(extra="forbid")
    channel: str = Field(max_length=300, examples=["acme/support@prod"])
    why: str = Field("", max_length=1000)


class Start(Channel):
    """A candidate, its share of the callers, and when servers roll it back."""

    candidate: str = Field(max_length=100, examples=["4"], description="a number, a digest or another channel")
    weight: int = Field(5, description="percent of the callers, 1 to 99")
    max_error_rate: float | None = None
    max_slowdown: float | None = None
    min_requests: int | None = None
    min_score: float | None = None


class Status(BaseModel):
    """Where a channel's rollout stands, and what this server has counted of it."""

    channel: str
    trial: dict[str, Any]
    ready: dict[str, int] = Field(description="version → percent of the callers, on this server")
    counts: dict[str, dict[str, Any]] = Field(description="version → requests, failed, first_byte_seconds")
    score: float | None = Field(description="of the candidate on the prompts for it, the last time")
    problem: str | None = Field(description="why this server does not follow yet")


@router.post("/status")
async def status(request: Request, wanted: Channel) -> Status:
    """Where a rollout stands."""
    replica, ref = _of(request, wanted)
    return await _status(replica, ref)


@router.post("/start")
async def start(request: Request, wanted: Start) -> Status:
    """Give a candidate a share of the callers; again, for another share or after a pause."""
    replica, ref = _of(request, wanted)
    candidate = await replica.blocking(replica.registry.resolve, ref.name.at(wanted.candidate))
    names = ("max_error_rate", "max_slowdown", "min_requests", "min_score")
    gates = {name: value for name in names if (value := getattr(wanted, name)) is not None}
    verb = partial(rollouts.start, candidate=candidate.record.version, weight=wanted.weight, gates=gates)
    return await _move(request, wanted, verb)


@router.post("/promote")
async def promote(request: Request, wanted: Channel) -> Status:
    """Give the candidate all callers."""
    return await _move(request, wanted, rollouts.promote)


@router.post("/pause")
async def pause(request: Request, wanted: Channel) -> Status:
    """Give all callers back to the stable version, for now."""
    return await _move(request, wanted, rollouts.pause)


@router.post("/abort")
async def abort(request: Request, wanted: Channel) -> Status:
    """Give all callers back to the stable version, as a rollback."""
    return await _move(request, wanted, rollouts.abort)


async def _move(request: Request, wanted: Channel, verb: Callable[..., ChannelMove]) -> Status:
    replica, ref = _of(request, wanted)
    caller: Caller = request.scope.get(CALLER, SINGLE_USER)
    who = f"key {caller.key}" if caller.key else "admin API"
    await replica.blocking(
        partial(verb, replica.registry, name=ref.name, channel=str(ref.channel), who=who, why=wanted.why)
    )
    await replica.poll()
    return await _status(replica, ref)


async def _status(replica: Replica, ref: AdapterRef) -> Status:
    log = await replica.blocking(replica.registry.channel_log, ref.name, str(ref.channel))
    await replica.rollout.deployment(ref)  # followed from now on, if it was not before
    pointer = next(p for p in replica.rollout.pointers if p.ref == ref)
    return Status(
        channel=str(ref),
        trial=to_plain(rollouts.read(log)),
        ready={str(version.record.ref): weight for version, weight in pointer.ready.shares},
        counts=replica.trials.counts(ref, pointer.ready),
        score=replica.trials.score_of(ref, pointer.wanted),
        problem=pointer.problem or None,
    )


def _of(request: Request, wanted: Channel) -> tuple[Replica, AdapterRef]:
    """Raises InvalidName, NotFound, UsageError."""
    replica: Replica = request.app.state.adapterhub
    caller: Caller = request.scope.get(CALLER, SINGLE_USER)
    ref = AdapterRef.parse(wanted.channel)
    if not caller.owns(ref.name):
        raise not_found(ref)
    if ref.channel in (None, LATEST):
        raise UsageError(f"{wanted.channel} is no channel that can be moved", why="it is like acme/support@prod")
    return replica, ref
