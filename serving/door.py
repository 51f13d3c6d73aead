"""Who comes in, by which route, and to which version: what is looked up for a request before its body counts."""

from __future__ import annotations

import asyncio
import logging

from adapterhub.errors import AdapterHubError, EngineError, Gone, NotFound, NotReady, RegistryAway
from adapterhub.refs import AdapterRef
from adapterhub.serving import tenancy
from adapterhub.serving.replica import Replica
from adapterhub.serving.rollout.deployment import Deployment
from adapterhub.serving.tenants.callers import SINGLE_USER, Caller
from adapterhub.serving.wire import Headers, Scope

log = logging.getLogger(__name__)


def find_replica(scope: Scope, route: tenancy.Route) -> Replica:
    """Raises EngineError where there is none, NotReady."""
    replica: Replica | None = getattr(scope["app"].state, "adapterhub", None)
    if replica is None:
        raise EngineError("AdapterHub did not start in this engine", why="ADAPTERHUB_SERVE or VLLM_PLUGINS is not set")
    if route.path not in tenancy.ALWAYS_OPEN and (why := replica.why_not_ready):
        raise NotReady("the server is not ready", why=why)
    return replica


def find_caller(replica: Replica, route: tenancy.Route, headers: Headers) -> Caller:
    """Who asks, and whether they may come in here. Raises Unauthorized, Forbidden, UsageError, StorageError."""
    if not replica.access.needs_keys:
        sent = dict(headers)
        tenancy.check_browser(_text(sent.get(b"host")), _text(sent.get(b"origin")))
    if route.kind == "open":
        return SINGLE_USER
    caller = replica.access.caller(headers)
    if route.scope is not None:
        caller.check_scope(route.scope)
    return caller


async def find_deployment(replica: Replica, ref: AdapterRef) -> Deployment:
    """What is asked for, with the registry's own words kept from the client: they name its address.

    Raises NotFound, Gone, and RegistryAway for what is not known here while the registry does not answer in time.
    """
    try:
        async with asyncio.timeout(replica.config.load_seconds):
            return await replica.rollout.deployment(ref)
    except NotFound as error:
        raise tenancy.not_found(ref) from error
    except Gone:
        raise
    except (AdapterHubError, TimeoutError) as error:
        log.error("%s cannot be looked up: %s", ref, error or "the registry does not answer in time")
        raise RegistryAway(f"{ref} cannot be looked up", why="the registry does not answer; try again") from error


def _text(header: bytes | None) -> str | None:
    return None if header is None else header.decode("latin-1")
