"""The bill of the real engine, against what its clients counted: to the token."""

from __future__ import annotations

import json
from datetime import UTC, datetime, timedelta
from typing import Any

import httpx
import pytest

from adapterhub.serving.usage import Counts

pytestmark = pytest.mark.engine
PROMPT = "What is the capital of France? " * 24  # longer than a block of the prefix cache
HELLO = [{"role": "user", "content": PROMPT}]


def booked(served: Any, adapter: str) -> Counts:
    """What the ledger has for an adapter; residence left out."""
    now = datetime.now(UTC)
    rows = served.ledger.rows(since=now - timedelta(days=1), until=now + timedelta(days=1))
    found = sum((counts for _, line, counts in rows if line.adapter == adapter), Counts())
    return Counts(**{**vars(found), "resident_ms": 0, "cold_loads": 0})


def counted(usage: dict[str, Any]) -> Counts:
    """What a client is told."""
    details = usage.get("prompt_tokens_details") or usage.get("input_tokens_details") or {}
    return Counts(
        requests=1,
        tokens_in=usage.get("prompt_tokens", usage.get("input_tokens", 0)),
        tokens_out=usage.get("completion_tokens", usage.get("output_tokens", 0)),
        tokens_cached=details.get("cached_tokens") or 0,
    )


def events(answer: httpx.Response) -> list[dict[str, Any]]:
    return [json.loads(line[6:]) for line in answer.iter_lines() if line.startswith("data: {")]


def test_the_ledger_says_what_the_clients_counted(served: Any) -> None:
    served.publish("acme/billed", seed=11)
    model, total = "acme/billed@1", Counts()
    common = {"model": model, "max_tokens": 9, "temperature": 0}
    chat, text = {"messages": HELLO}, {"prompt": PROMPT}
    asked: list[tuple[str, dict[str, Any]]] = [
        ("chat/completions", chat),
        ("chat/completions", chat | {"n": 2, "temperature": 1}),
        ("chat/completions", chat | {"stop": ["e", "a", "o"]}),
        ("completions", text),
        # short: of several prompts vLLM tells how much of one was cached
        ("completions", {"prompt": ["Hello there", "Good day"], "n": 2, "temperature": 1}),
    ]
    for path, body in asked:
        answer = served.http.post(f"/v1/{path}", json=common | body).json()
        total += counted(answer["usage"])
        streamed = common | body | {"stream": True, "stream_options": {"include_usage": True}}
        with served.http.stream("POST", f"/v1/{path}", json=streamed) as stream:
            total += counted(events(stream)[-1]["usage"])
    anthropic = served.http.post("/v1/messages", json=common | chat).json()["usage"]
    total += Counts(
        requests=1,
        tokens_in=anthropic["input_tokens"] + (anthropic.get("cache_read_input_tokens") or 0),
        tokens_out=anthropic["output_tokens"],
        tokens_cached=anthropic.get("cache_read_input_tokens") or 0,
    )
    responses = {"model": model, "input": PROMPT, "max_output_tokens": 9, "temperature": 0}
    total += counted(served.http.post("/v1/responses", json=responses).json()["usage"])
    with served.http.stream("POST", "/v1/responses", json=responses | {"stream": True}) as stream:
        total += counted(events(stream)[-1]["response"]["usage"])
    served.until(lambda: booked(served, "acme/billed").requests >= total.requests)
    assert booked(served, "acme/billed") == total
    assert total.tokens_cached > 0


def test_a_stream_whose_client_asked_for_no_usage_counts_and_shows_none(served: Any) -> None:
    served.publish("acme/hushed", seed=12)
    with served.stream("acme/hushed", tokens=7) as (answer, chunks):
        assert answer.status_code == 200
        assert all("usage" not in chunk or chunk["usage"] is None for chunk in chunks)
    served.until(lambda: booked(served, "acme/hushed").requests == 1)
    assert booked(served, "acme/hushed").tokens_out == 7


def test_clients_that_leave_pay_for_what_was_made_and_for_no_more(served: Any) -> None:
    """The stream's client reads some tokens; that of a whole answer gets nothing, and pays nevertheless."""
    served.publish("acme/left", seed=13)
    served.ask("acme/left", tokens=1)  # loaded
    with served.stream("acme/left", tokens=400) as (_, chunks):
        received = sum(1 for _, chunk in zip(range(12), chunks, strict=False) if chunk["choices"][0]["delta"])
    served.until(lambda: booked(served, "acme/left").cancelled == 1)
    streamed = booked(served, "acme/left")
    assert received - 1 <= streamed.tokens_out - 1 < 400
    impatient = {"model": "acme/left", "messages": HELLO, "max_tokens": 400, "ignore_eos": True}
    with pytest.raises(httpx.ReadTimeout):
        served.http.post("/v1/chat/completions", json=impatient, timeout=2)
    served.until(lambda: booked(served, "acme/left").cancelled == 2)
    assert 0 < booked(served, "acme/left").tokens_out - streamed.tokens_out < 400


def test_prometheus_gets_our_numbers_beside_those_of_the_engine(served: Any) -> None:
    page = served.http.get("/metrics").text
    for name in (
        "tokens_total",
        "first_token_seconds_bucket",
        "load_seconds_bucket",
        "ledger_lag_seconds",
        "ready 1.0",
    ):
        assert f"adapterhub_{name}" in page
    assert "vllm:" in page


def test_the_engines_spans_are_below_ours(served: Any, collector: Any) -> None:
    trace = "4bf92f3577b34da6a3ce929d0e0e4736"
    served.publish("acme/traced", seed=14)
    body = {"model": "acme/traced", "messages": HELLO, "max_tokens": 2}
    headers = {"traceparent": f"00-{trace}-00f067aa0ba902b7-01"}
    assert served.http.post("/v1/chat/completions", json=body, headers=headers).status_code == 200

    def spans() -> dict[str, Any]:
        return {span.name: span for span in collector.spans if span.trace_id.hex() == trace}

    served.until(lambda: {"POST /v1/chat/completions", "fetch", "generate", "llm_request"} <= spans().keys())
    assert spans()["llm_request"].parent_span_id == spans()["generate"].span_id
    assert PROMPT[:40] not in str(list(collector.spans))
