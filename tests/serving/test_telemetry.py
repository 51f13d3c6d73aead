"""What is told of a request to Prometheus, to the log and to a collector of traces; and what never is."""

from __future__ import annotations

import json
import logging
import subprocess
import sys
from collections.abc import Iterator
from typing import Any

import pytest
from prometheus_client import CollectorRegistry, generate_latest

from adapterhub.errors import NotFound
from adapterhub.serving.arguments import LOGGING, LOGGING_JSON
from adapterhub.serving.engine.log import cause, telling
from adapterhub.serving.telemetry.flight import Flight
from adapterhub.serving.telemetry.jsonlog import JsonFormatter
from adapterhub.serving.telemetry.metrics import OTHER, TENANTS, Metrics
from adapterhub.serving.telemetry.telemetry import Telemetry, requests_log
from adapterhub.serving.telemetry.tracing import Tracing, endpoint
from adapterhub.serving.tenants.callers import Caller

ROUTE = "/v1/chat/completions"
PARENT = "00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01"


def flight(telemetry: Telemetry, *, tenant: str = "acme", headers: Any = ()) -> Flight:
    """One that was answered with 7 tokens."""
    made = Flight(ROUTE, "request-1")
    made.route, made.caller, made.model = ROUTE, Caller(tenant, "k1"), "acme/support@3"
    telemetry.begin(made, headers)
    for name in ("admit", "read", "admit", "resolve", "load", "queue", "lease", "rewrite"):
        made.lap(name)
    made.generates, made.status, made.streams, made._went_out = True, 200, True, True
    telemetry.to_engine(made)
    made.account.tokens_in, made.account.tokens_out = 30, 7
    made._came(3)
    made._came(4)
    made.lap("generate")
    made.lap("finish")
    return made


class TestMetrics:
    def test_tenants_and_adapters_are_bounded(self) -> None:
        registry = CollectorRegistry()
        telemetry = Telemetry(Metrics(registry, adapters=1))
        for number in range(TENANTS + 20):
            made = flight(telemetry, tenant=f"t{number}")
            made.model = f"t{number}/bot@1"
            telemetry.end(made)
        value = registry.get_sample_value
        assert value("adapterhub_tokens_total", {"tenant": OTHER, "kind": "out"}) == 20 * 7
        assert value("adapterhub_tokens_total", {"tenant": "t0", "kind": "in"}) == 30
        assert value("adapterhub_adapter_tokens_total", {"adapter": OTHER, "kind": "out"}) == (TENANTS + 19) * 7
        tenants = {s.labels["tenant"] for f in registry.collect() for s in f.samples if "tenant" in s.labels}
        assert len(tenants) == TENANTS + 1

    def test_adapters_are_no_labels_unless_somebody_asks(self) -> None:
        registry = CollectorRegistry()
        telemetry = Telemetry(Metrics(registry))
        telemetry.end(flight(telemetry))
        assert "support" not in generate_latest(registry).decode()

    def test_waiting_is_not_time_in_our_code(self) -> None:
        registry = CollectorRegistry()
        telemetry = Telemetry(Metrics(registry))
        made = flight(telemetry)
        made.laps = [("admit", 0, 0.001), ("read", 0, 9), ("queue", 0, 3), ("generate", 0, 50), ("rewrite", 0, 0.002)]
        telemetry.end(made)
        assert registry.get_sample_value("adapterhub_middleware_seconds_sum", {"span": "all"}) == pytest.approx(0.003)
        assert registry.get_sample_value("adapterhub_queue_seconds_sum", {"tenant": "acme"}) == 3
        assert registry.get_sample_value("adapterhub_middleware_seconds_sum", {"span": "generate"}) is None


class TestLog:
    @pytest.fixture
    def lines(self) -> Iterator[list[dict[str, Any]]]:
        """What the log in JSON says of requests."""
        found: list[dict[str, Any]] = []
        handler = logging.Handler()
        handler.emit = lambda record: found.append(json.loads(JsonFormatter().format(record)))  # type: ignore[method-assign]
        requests_log.addHandler(handler)
        requests_log.setLevel(logging.INFO)
        yield found
        requests_log.removeHandler(handler)
        requests_log.setLevel(logging.NOTSET)

    def test_one_object_a_request(self, lines: list[dict[str, Any]]) -> None:
        telemetry = Telemetry.alone()
        telemetry.end(flight(telemetry))
        (line,) = lines
        assert line["request_id"] == "request-1" and line["model"] == "acme/support@3"
        assert (line["tenant"], line["key"], line["status"], line["outcome"]) == ("acme", "k1", 200, "ok")
        assert (line["tokens_in"], line["tokens_out"]) == (30, 7)
        assert {"admit", "queue", "generate"} <= line["spans_ms"].keys() and line["ms"] >= line["ours_ms"]

    def test_refused(self, lines: list[dict[str, Any]]) -> None:
        telemetry = Telemetry.alone()
        made = Flight("/v1/Chat/../secret-path", "r")
        made.error, made.status = NotFound("no route"), 404
        telemetry.end(made)
        assert lines[0]["reason"] == "not_found" and "secret-path" not in json.dumps(lines)

    def test_off_where_the_log_is_for_people(self) -> None:
        assert LOGGING["loggers"]["adapterhub.requests"]["level"] == "WARNING"
        assert "adapterhub.requests" not in LOGGING_JSON["loggers"]

    def test_every_process_of_the_engine_can_write_it(self) -> None:
        program = (
            "import logging.config\n"
            "from adapterhub.serving.arguments import LOGGING_JSON\n"
            "logging.config.dictConfig(LOGGING_JSON)\n"
            "logging.getLogger('adapterhub.requests').info('one', extra={'fields': {'tokens_in': 3}})\n"
            "logging.getLogger('vllm.engine').info('two')\n"
        )
        done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
        one, two = map(json.loads, done.stderr.splitlines())
        assert (one["logger"], one["tokens_in"]) == ("adapterhub.requests", 3)
        assert (two["logger"], two["message"]) == ("vllm.engine", "two")

    def test_a_record_with_a_stack_trace_and_what_a_person_is_told_of_it(self) -> None:
        try:
            raise RuntimeError('no kernel for "head"')
        except RuntimeError as error:
            record = logging.LogRecord("x", logging.ERROR, "", 1, "it %s\n", ("died",), (type(error), error, None))
        line = JsonFormatter().format(record)
        assert "\n" not in line and json.loads(line)["message"] == "it died\n"
        assert telling(line) == line
        assert cause([line, line[:40]]) == 'RuntimeError: no kernel for "head"'


# ── traces ───────────────────────────────────────────────────────────────────────────────────────────────────


class TestTraces:
    def test_a_request_with_its_parts_reaches_the_collector(self, collector: Any) -> None:
        where = endpoint({"OTEL_EXPORTER_OTLP_ENDPOINT": collector.url})
        assert where is not None
        telemetry = Telemetry.alone()
        telemetry.tracing = Tracing.to(where)
        made = flight(telemetry, headers=[(b"traceparent", PARENT.encode()), (b"authorization", b"Bearer ah_secret")])
        engine = dict(telemetry.tracing.headers(made))[b"traceparent"].decode()
        began = next(begin for name, begin, _ in made.laps if name == "load")
        telemetry.fetches["acme/support@3"] = (began, began + 1)
        telemetry.end(made)
        telemetry.tracing.close()
        spans = {span.name: span for span in collector.spans}
        assert set(spans) == {f"POST {ROUTE}", "admit", "resolve", "load", "fetch", "queue", "generate"}
        assert collector.services == {"adapterhub"}
        root = spans[f"POST {ROUTE}"]
        assert {span.trace_id.hex() for span in spans.values()} == {PARENT.split("-")[1]} == {engine.split("-")[1]}
        assert root.parent_span_id.hex() == PARENT.split("-")[2]
        assert spans["fetch"].parent_span_id == spans["load"].span_id
        assert all(spans[n].parent_span_id == root.span_id for n in ("admit", "resolve", "load", "queue", "generate"))
        assert root.start_time_unix_nano <= spans["queue"].start_time_unix_nano <= root.end_time_unix_nano
        attributes = {a.key: a.value for a in root.attributes}
        assert attributes["adapterhub.tenant"].string_value == "acme"
        assert attributes["adapterhub.tokens_out"].int_value == 7
        assert "secret" not in str(collector.spans)

    def test_off_unless_somebody_names_a_collector(self) -> None:
        assert endpoint({}) is None
        assert endpoint({"OTEL_EXPORTER_OTLP_ENDPOINT": " "}) is None
        assert endpoint({"OTEL_EXPORTER_OTLP_ENDPOINT": "http://c:4318", "OTEL_SDK_DISABLED": "true"}) is None
        assert endpoint({"OTEL_EXPORTER_OTLP_ENDPOINT": "http://c:4318/"}) == "http://c:4318/v1/traces"
        both = {"OTEL_EXPORTER_OTLP_ENDPOINT": "http://a", "OTEL_EXPORTER_OTLP_TRACES_ENDPOINT": "http://b/t"}
        assert endpoint(both) == "http://b/t"
        made = flight(Telemetry.alone())
        assert made.span is None

    def test_a_request_without_a_trace_begins_one(self) -> None:
        from opentelemetry.sdk.trace import TracerProvider

        telemetry = Telemetry.alone()
        telemetry.tracing = Tracing(TracerProvider())
        made = flight(telemetry, headers=[(b"traceparent", b"garbage")])
        assert made.span.get_span_context().trace_id
        telemetry.end(made)
        assert not made.span.is_recording()
