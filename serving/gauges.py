"""What `/metrics` tells of the state of a server: looked up when somebody asks, so that it costs requests nothing."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from adapterhub.serving.replica import Replica


def connect(replica: Replica) -> None:
    """From now on the gauges are those of ``replica``."""
    metrics, places, line = replica.telemetry.metrics, replica.residency.places, replica.admission.line
    metrics.resident.set_function(lambda: len(places.resident))
    metrics.places.set(places.capacity)
    metrics.running.set_function(lambda: line.running)
    metrics.waiting.set_function(lambda: line.all_waiting)
    metrics.ready.set_function(lambda: not replica.why_not_ready)
    metrics.registry_away.set_function(lambda: replica.rollout.is_away)
    metrics.keys_away.set_function(lambda: replica.access.is_away)
    if (metering := replica.telemetry.metering) is not None:
        metrics.ledger_lag.set_function(lambda: metering.lag)


async def watch_cache(replica: Replica, *, seconds: float = 60.0) -> None:
    """Measure the local copies again and again, until cancelled: a walk over a folder that may be large."""
    while True:
        replica.telemetry.metrics.cache_bytes.set(await replica.blocking(replica.versions.measure))
        await asyncio.sleep(seconds)
