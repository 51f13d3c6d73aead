"""What became of requests and loads, told to everybody who keeps count: the bill, Prometheus, the log, traces.

middleware ──► begin(flight) … end(flight) ──► metering · metrics · log · tracing
residency  ──► loaded, refused, forgot       ──► metering · metrics

Never a prompt, never a key's secret, never an answer.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Sequence
from dataclasses import dataclass, field

from prometheus_client import CollectorRegistry

from adapterhub.errors import AdapterHubError
from adapterhub.manifest import Record
from adapterhub.serving import tenancy
from adapterhub.serving.bill.metering import Metering
from adapterhub.serving.telemetry.flight import WAITS, Flight
from adapterhub.serving.telemetry.metrics import Metrics
from adapterhub.serving.telemetry.tracing import Tracing
from adapterhub.serving.usage import Counts, Line

requests_log = logging.getLogger("adapterhub.requests")  # one line a request, where `--log-format json` turns it on


@dataclass
class Telemetry:
    """Of one server. One event loop; not for threads."""

    metrics: Metrics
    metering: Metering | None = None  # None: nothing is billed
    tracing: Tracing | None = None
    fetches: dict[str, tuple[float, float]] = field(default_factory=dict)  # of loaded versions: from the registry, when
    downloaded: set[str] = field(default_factory=set)  # digests that came from the registry, until they are loaded

    @classmethod
    def alone(cls) -> Telemetry:
        """Numbers that nobody reads."""
        return cls(Metrics(CollectorRegistry()))

    async def close(self) -> None:
        """What was counted is written down."""
        if self.metering is not None:
            await self.metering.close()
        if self.tracing is not None:
            await asyncio.to_thread(self.tracing.close)

    # ── requests ─────────────────────────────────────────────────────────────────────────────────────────────

    def begin(self, flight: Flight, headers: Sequence[tuple[bytes, bytes]]) -> None:
        """Its caller is known; ``headers`` are the request's."""
        assert flight.caller is not None, "found out just now"
        if self.tracing is not None and flight.route in tenancy.TOKEN_ROUTES:
            self.tracing.begin(flight, headers)
        flight.gap = self.metrics.of_tenant(flight.caller.tenant).inter_token.observe

    def to_engine(self, flight: Flight) -> Sequence[tuple[bytes, bytes]]:
        """It goes to the engine now, with these headers in place of its own of those names."""
        return self.tracing.headers(flight) if self.tracing is not None else ()

    def end(self, flight: Flight) -> None:
        """Its last byte is out, or it was refused."""
        if not flight.generates and flight.error is None:
            return
        outcome, account, caller = flight.outcome, flight.account, flight.caller
        tenant = caller.tenant if caller else None
        mine = self.metrics.of_tenant(tenant)
        if flight.error is not None:
            self.metrics.rejections.labels(self.metrics.tenant(tenant), _reason(flight.error)).inc()
        self.metrics.of_request(tenant, flight.route, outcome).inc()
        spans, ours = flight.spans(), 0.0
        for name, seconds in spans.items():
            if name not in WAITS:
                self.metrics.of_span(name).observe(seconds)
                ours += seconds
        self.metrics.of_span("all").observe(ours)
        if "queue" in spans:
            mine.queue.observe(spans["queue"])
        if flight.streams and flight.first_token is not None:
            mine.first_token.observe(flight.first_token - flight.began)
        if account.tokens:
            self._count_tokens(flight)
        if self.metering is not None and flight.error is None:
            self._bill(flight, self.metering)
        if self.tracing is not None:
            self.tracing.end(flight, fields_of(flight), fetched=self.fetches.get(flight.model))
        if requests_log.isEnabledFor(logging.INFO):
            requests_log.info("%s %s", flight.route, outcome, extra={"fields": fields_of(flight)})

    def _count_tokens(self, flight: Flight) -> None:
        account = flight.account
        mine = self.metrics.of_tenant(flight.caller.tenant if flight.caller else None)
        mine.tokens_in.inc(account.tokens_in)
        mine.tokens_out.inc(account.tokens_out)
        mine.tokens_cached.inc(account.tokens_cached)
        if self.metrics.tells_adapters:
            adapter = self.metrics.adapter(flight.model.partition("@")[0])
            self.metrics.adapter_tokens.labels(adapter, "in").inc(account.tokens_in)
            self.metrics.adapter_tokens.labels(adapter, "out").inc(account.tokens_out)

    def _bill(self, flight: Flight, metering: Metering) -> None:
        account, caller, outcome = flight.account, flight.caller, flight.outcome
        metering.add(
            Line.of(tenant=caller.tenant if caller else None, key=caller.key if caller else None, model=flight.model),
            Counts(
                requests=1,
                cancelled=int(outcome == "cancelled"),
                failed=int(outcome == "failed"),
                tokens_in=account.tokens_in,
                tokens_out=account.tokens_out,
                tokens_cached=account.tokens_cached,
            ),
        )

    # ── adapters ─────────────────────────────────────────────────────────────────────────────────────────────

    def loaded(self, record: Record, seconds: float) -> None:
        """A version was brought into the engine, in so many seconds."""
        tier = "registry" if record.digest in self.downloaded else "disk"
        self.downloaded.discard(record.digest)
        self.metrics.loads.labels(tier).observe(seconds)
        if self.metering is not None:
            self.metering.loaded(str(record.ref))

    def refused(self) -> None:
        """A version could not be brought into the engine."""
        self.metrics.failed_loads.inc()

    def fetched(self, record: Record, begin: float, end: float) -> None:
        """A version's files came from the registry, between two moments of `time.perf_counter`."""
        self.downloaded.add(record.digest)
        self.fetches[str(record.ref)] = (begin, end)

    def forgot(self, name: str, *, swapped: bool) -> None:
        """A version left the engine. ``swapped``: to make room."""
        self.fetches.pop(name, None)
        if swapped:
            self.metrics.swaps.inc()
        if self.metering is not None:
            self.metering.forgot(name)


def _reason(error: AdapterHubError) -> str:
    """``too_many_requests``, ``not_found`` …: as many as there are kinds of errors."""
    name = type(error).__name__
    return "".join(f"_{c.lower()}" if c.isupper() else c for c in name).strip("_")


def fields_of(flight: Flight) -> dict[str, object]:
    """What the log says of a request."""
    caller, account = flight.caller, flight.account
    spans = flight.spans()
    found: dict[str, object] = {
        "request_id": flight.request_id,
        "route": flight.route,
        "tenant": caller.tenant if caller else None,
        "key": caller.key if caller else None,
        "model": flight.model or None,
        "status": flight.status,
        "outcome": flight.outcome,
        "ms": round(flight.seconds * 1000, 3),
        "ours_ms": round(1000 * sum(seconds for name, seconds in spans.items() if name not in WAITS), 3),
        "spans_ms": {name: round(1000 * seconds, 3) for name, seconds in spans.items()},
        "tokens_in": account.tokens_in,
        "tokens_out": account.tokens_out,
        "tokens_cached": account.tokens_cached,
    }
    if flight.first_token is not None and flight.streams:
        found["first_token_ms"] = round((flight.first_token - flight.began) * 1000, 3)
    if flight.error is not None:
        found["reason"] = _reason(flight.error)
    return found
