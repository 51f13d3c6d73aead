"""The admin API: everything below ``/adapterhub/``, described by ``GET /adapterhub/openapi.json``.

With keys it needs the scope ``admin``, and moving a channel of one's own ``channels`` (`tenancy` says which route needs
which). No path has a part that varies: what is meant stands in the body, so that the allow-list stays a table.
"""

from __future__ import annotations

import json
from dataclasses import asdict
from typing import Any
from urllib.parse import urlsplit

from fastapi import APIRouter, FastAPI, Request, Response
from fastapi.openapi.utils import get_openapi
from pydantic import BaseModel, ConfigDict, Field

import adapterhub
from adapterhub.errors import AdapterHubError, Conflict, NotFound, UsageError
from adapterhub.refs import AdapterRef
from adapterhub.serving import admin_rollouts
from adapterhub.serving.answers import error_answer, error_headers
from adapterhub.serving.config import ServeConfig
from adapterhub.serving.database import masked
from adapterhub.serving.replica import Replica
from adapterhub.serving.tenancy import not_found
from adapterhub.serving.tenants.callers import CALLER, SINGLE_USER, Caller

PREFIX = "/adapterhub"
router = APIRouter(prefix=PREFIX, tags=["admin"])


class Model(BaseModel):
    """A version, by number, digest or channel."""

    model_config = ConfigDict(extra="forbid")
    model: str = Field(max_length=300, examples=["acme/support@3"])


class Move(BaseModel):
    """Where a channel points from now on."""

    model_config = ConfigDict(extra="forbid")
    channel: str = Field(max_length=300, examples=["acme/support@prod"])
    version: int = Field(ge=1, examples=[3])
    why: str = Field("", max_length=1000)


class Loaded(BaseModel):
    """A version that the engine holds."""

    model: str
    leases: int = Field(description="requests under way on it")
    pinned: bool


class Version(BaseModel):
    model: str
    digest: str


@router.get("/state")
async def state(request: Request) -> dict[str, Any]:
    """What is loaded, and which version each reference means here."""
    return _replica(request).state()


@router.post("/poll")
async def poll(request: Request) -> dict[str, Any]:
    """Look at the registry now instead of at the next poll; answers when what moved is served."""
    await _replica(request).poll()
    return _replica(request).state()


@router.get("/loaded")
async def loaded(request: Request) -> list[Loaded]:
    """The versions that the engine holds, the least recently used first."""
    places = _replica(request).residency.places
    return [Loaded(model=name, leases=places.leases(name), pinned=places.is_pinned(name)) for name in places.resident]


@router.post("/load")
async def load(request: Request, wanted: Model) -> Version:
    """Load a version before anybody asks for it."""
    replica = _replica(request)
    version = await replica.rollout.current(_reference(wanted))
    await replica.ensure(version.record)
    return Version(model=str(version.record.ref), digest=version.record.digest)


@router.post("/pin")
async def pin(request: Request, wanted: Model) -> Version:
    """Load a version and keep it, however long nobody asks for it."""
    replica = _replica(request)
    version = await replica.rollout.current(_reference(wanted))
    replica.residency.places.pin(str(version.record.ref))
    await replica.ensure(version.record)
    return Version(model=str(version.record.ref), digest=version.record.digest)


@router.post("/unpin")
async def unpin(request: Request, wanted: Model) -> list[Loaded]:
    """Let it be forgotten again when its room is needed."""
    _replica(request).residency.places.unpin(_loaded(request, wanted))
    return await loaded(request)


@router.post("/forget")
async def forget(request: Request, wanted: Model) -> list[Loaded]:
    """Free a version that nobody uses; 409 while somebody does."""
    name = _loaded(request, wanted)
    if not await _replica(request).residency.forget(name):
        raise Conflict(f"{name} is in use", why="requests are under way on it, or it is pinned")
    return await loaded(request)


@router.post("/channels")
async def channels(request: Request, move: Move) -> dict[str, Any]:
    """Move a channel of one's own adapters."""
    replica, caller = _replica(request), _caller(request)
    ref = AdapterRef.parse(move.channel)
    if not caller.owns(ref.name):
        raise not_found(ref)
    if ref.channel is None:
        raise UsageError(f"{move.channel} is no channel", why="it is written like acme/support@prod")
    who = f"key {caller.key}" if caller.key else "admin API"
    await replica.blocking(_set_channel, replica, ref, move, who)
    await replica.poll()
    return {"channel": str(ref), "version": move.version}


@router.get("/config")
async def config(request: Request) -> dict[str, Any]:
    """How this server was started, without passwords."""
    return shown(_replica(request).config)


@router.get("/openapi.json", include_in_schema=False)
async def openapi() -> dict[str, Any]:
    routes = [*router.routes, *admin_rollouts.router.routes]
    return get_openapi(title="AdapterHub admin API", version=adapterhub.__version__, routes=routes)


def attach(app: FastAPI) -> None:
    """Add the routes, and the answer to what they raise."""
    app.include_router(router)
    app.include_router(admin_rollouts.router)
    app.add_exception_handler(AdapterHubError, _refused)


async def _refused(request: Request, error: Exception) -> Response:
    assert isinstance(error, AdapterHubError), "registered for those"
    status, body = error_answer(error, path=request.url.path, request_id=request.headers.get("x-request-id", "-"))
    headers = {name.decode(): value.decode() for name, value in error_headers(error)}
    return Response(body, status_code=status, headers=headers, media_type="application/json")


def shown(config: ServeConfig) -> dict[str, Any]:
    """A configuration for people."""
    values: dict[str, Any] = json.loads(json.dumps(asdict(config), default=str))
    values["database"] = masked(config.database) if config.database else None
    values["redis"] = "set" if config.redis else None
    values["webhook"] = urlsplit(config.webhook).hostname if config.webhook else None  # its path may be a secret
    values["webhook_signed"] = bool(values.pop("webhook_secret"))
    return values


def _replica(request: Request) -> Replica:
    replica: Replica = request.app.state.adapterhub
    return replica


def _caller(request: Request) -> Caller:
    caller: Caller = request.scope.get(CALLER, SINGLE_USER)
    return caller


def _reference(wanted: Model) -> AdapterRef:
    return AdapterRef.parse(wanted.model)


def _loaded(request: Request, wanted: Model) -> str:
    """The name of a version that is loaded. Raises NotFound."""
    if not _replica(request).residency.places.is_resident(wanted.model):
        raise NotFound(f"{wanted.model} is not loaded", why="GET /adapterhub/loaded lists what is")
    return wanted.model


def _set_channel(replica: Replica, ref: AdapterRef, move: Move, who: str) -> None:
    replica.registry.set_channel(ref.name, str(ref.channel), {move.version: 100}, who=who, why=move.why)
