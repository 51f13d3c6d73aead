"""Traces in OpenTelemetry's words: a span for the request, and one below it for each part of its way.

    POST /v1/chat/completions          a child of the client's own span, where it sent a `traceparent`
    ├── admit      key, limits, body
    ├── resolve    which version
    ├── load       waiting for it; `fetch` in it where it came from the registry
    ├── queue      waiting for the turn
    └── generate   the engine; its own spans are below this one

Off unless ``OTEL_EXPORTER_OTLP_ENDPOINT`` is set. What a request said, and what it was answered, is in none of them.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from adapterhub.errors import MissingDependency

if TYPE_CHECKING:
    from adapterhub.serving.telemetry.flight import Flight

_ENDPOINTS = ("OTEL_EXPORTER_OTLP_TRACES_ENDPOINT", "OTEL_EXPORTER_OTLP_ENDPOINT")
_PROPAGATED = (b"traceparent", b"tracestate")
_SHOWN = frozenset({"admit", "resolve", "load", "count", "queue"})


def endpoint(environ: Mapping[str, str]) -> str | None:
    """Where spans go over HTTP; None: nowhere."""
    if environ.get("OTEL_SDK_DISABLED", "").strip().lower() == "true":
        return None
    traces, everything = (environ.get(name, "").strip() for name in _ENDPOINTS)
    return traces or (f"{everything.rstrip('/')}/v1/traces" if everything else None)


class Tracing:
    """Spans of requests, handed to a tracer provider."""

    def __init__(self, provider: Any) -> None:
        """``provider`` is OpenTelemetry's TracerProvider."""
        from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

        self._provider = provider
        self._tracer = provider.get_tracer("adapterhub")
        self._propagator = TraceContextTextMapPropagator()

    @classmethod
    def to(cls, url: str) -> Tracing:
        """Sent to a collector in the background, over HTTP. Raises MissingDependency."""
        try:
            from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
            from opentelemetry.sdk.resources import SERVICE_NAME, Resource
            from opentelemetry.sdk.trace import TracerProvider
            from opentelemetry.sdk.trace.export import BatchSpanProcessor
        except ImportError as error:
            raise MissingDependency(
                "OTEL_EXPORTER_OTLP_ENDPOINT is set, and OpenTelemetry is not installed",
                why=str(error),
                hint="pip install 'adapterhub[tracing]', or unset it",
            ) from error
        resource = Resource.create()  # of the environment, which may name the service
        if str(resource.attributes.get(SERVICE_NAME, "")).startswith("unknown_service"):
            resource = resource.merge(Resource({SERVICE_NAME: "adapterhub"}))
        provider = TracerProvider(resource=resource)
        provider.add_span_processor(BatchSpanProcessor(OTLPSpanExporter(endpoint=url)))
        return cls(provider)

    def begin(self, flight: Flight, headers: Sequence[tuple[bytes, bytes]]) -> None:
        """The request came."""
        from opentelemetry.trace import SpanKind

        sent = {name.decode(): value.decode("latin-1") for name, value in headers if name in _PROPAGATED}
        flight.span = self._tracer.start_span(
            f"POST {flight.route}",
            context=self._propagator.extract(sent),
            kind=SpanKind.SERVER,
            start_time=_at(flight.began),
        )

    def headers(self, flight: Flight) -> list[tuple[bytes, bytes]]:
        """The engine gets the request now, with these: its spans are below ours."""
        from opentelemetry.trace import set_span_in_context

        if flight.span is None:
            return []
        below = set_span_in_context(flight.span)
        flight.generating = self._tracer.start_span("generate", context=below, start_time=_at(flight.ended))
        carrier: dict[str, str] = {}
        self._propagator.inject(carrier, context=set_span_in_context(flight.generating))
        return [(name.encode(), value.encode()) for name, value in carrier.items()]

    def end(self, flight: Flight, fields: Mapping[str, object], *, fetched: tuple[float, float] | None) -> None:
        """The request is over; ``fields`` are what the log says of it.

        ``fetched``: from when to when its version came from the registry, if that was ever.
        """
        from opentelemetry.trace import Status, StatusCode, set_span_in_context

        if flight.span is None:
            return
        below = set_span_in_context(flight.span)
        for name, begin, end in flight.laps:
            if name in _SHOWN:
                span = self._tracer.start_span(name, context=below, start_time=_at(begin))
                if name == "load" and fetched is not None and fetched[1] > begin:
                    fetch = self._tracer.start_span(
                        "fetch", context=set_span_in_context(span), start_time=_at(max(begin, fetched[0]))
                    )
                    fetch.end(_at(min(end, fetched[1])))
                span.end(_at(end))
            elif name == "generate" and flight.generating is not None:
                flight.generating.end(_at(end))
        for key, value in fields.items():
            if isinstance(value, str | int | float):
                flight.span.set_attribute(f"adapterhub.{key}", value)
        flight.span.set_attribute("http.response.status_code", flight.status)
        if flight.outcome in ("failed", "refused") and flight.status >= 500:
            flight.span.set_status(Status(StatusCode.ERROR))
        flight.span.end(_at(flight.ended))

    def close(self) -> None:
        """Send what waits. Blocking."""
        self._provider.shutdown()


def _at(seconds: float) -> int:
    """A time of the flight's clock, in nanoseconds since 1970."""
    return time.time_ns() - int((time.perf_counter() - seconds) * 1e9)
