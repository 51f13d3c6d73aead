"""The middleware alone, on one core: the engine is a stub behind vLLM's own seams, and everything of ours is on.

Keys, limits a minute, an adapter that is loaded, a turn, a lease, metering into SQLite, Prometheus. Requests and
streamed chunks a second, the peer being the stub without us; and the time spent in our code per request, by span, from
the histogram that `/metrics` shows (p50 and p99 are upper bounds of its buckets).

    python benchmarks/middleware.py [--seconds 10] [--profile]
"""

from __future__ import annotations

import argparse
import asyncio
import cProfile
import json
import os
import pstats
import sys
import tempfile
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import uvloop
from machine import machine
from models import Shape, write_adapter, write_base
from prometheus_client import CollectorRegistry

from adapterhub.base import find_base
from adapterhub.refs import AdapterName
from adapterhub.registry import draft, open_registry
from adapterhub.serving import gauges
from adapterhub.serving.bill.account import metered
from adapterhub.serving.bill.ledger import Ledger
from adapterhub.serving.bill.metering import Metering
from adapterhub.serving.config import ServeConfig
from adapterhub.serving.database import default_url, open_database
from adapterhub.serving.middleware import TenancyMiddleware
from adapterhub.serving.replica import Replica
from adapterhub.serving.telemetry.metrics import Metrics
from adapterhub.serving.telemetry.telemetry import Telemetry
from adapterhub.serving.tenants.access import Access
from adapterhub.serving.tenants.callers import Limits
from adapterhub.serving.tenants.keys import Tenant
from adapterhub.serving.tenants.tenants import Tenants

BARS = {"requests": 4_000, "chunks": 50_000, "p50": 1.5, "p99": 5.0}
CLIENTS = 32
CHUNKS = 256  # of one stream
TINY = Shape(width=64, inner=128, layers=2, heads=4, key_heads=2, vocabulary=512)
PATH = "/v1/chat/completions"
MANY = 10**9  # a minute: limits that are counted and not reached
CHUNK = b"data: " + json.dumps(
    {
        "id": "chatcmpl-0123456789abcdef",
        "object": "chat.completion.chunk",
        "created": 1764000000,
        "model": "acme/support@1",
        "choices": [{"index": 0, "delta": {"content": " word"}, "logprobs": None, "finish_reason": None}],
    }
).encode() + b"\n\n"  # fmt: skip
ANSWER = b'{"choices": [{"message": {"role": "assistant", "content": "A short answer."}}]}'
STREAM_START = {"type": "http.response.start", "status": 200, "headers": [(b"content-type", b"text/event-stream")]}
START = {"type": "http.response.start", "status": 200, "headers": [(b"content-type", b"application/json")]}


class Engine:
    """Of vLLM what our code meets: an engine client that gives tokens out, and a place to load adapters into."""

    is_dead = False

    def __init__(self) -> None:
        metered(self)

    async def add_request(self, *_: Any) -> None:
        return None

    async def generate(self, prompt: Any, params: Any, request_id: str) -> AsyncIterator[Any]:
        await self.add_request(request_id, prompt, params)
        output = SimpleNamespace(
            prompt_token_ids=[1] * 40, num_cached_tokens=16, outputs=[SimpleNamespace(index=0, token_ids=[7])]
        )
        for _ in range(params.steps):
            yield output

    async def encode(self, *_: Any) -> None:
        raise NotImplementedError  # embeddings: no request of this benchmark asks for any

    async def load(self, name: str, path: Path) -> None: ...

    async def forget(self, name: str) -> None: ...

    async def beat(self) -> None: ...


def stub(engine: Engine) -> Any:
    """An ASGI application that answers with the engine's tokens, and reads no more of the body than it must."""
    whole, streamed = (
        SimpleNamespace(output_kind=SimpleNamespace(name=kind), steps=steps)
        for kind, steps in (("FINAL_ONLY", 1), ("DELTA", CHUNKS))
    )

    async def app(scope: Any, receive: Any, send: Any) -> None:
        body = (await receive())["body"]
        if b'"stream": true' not in body:
            async for _ in engine.generate(None, whole, "r"):
                pass
            await send(START)
            await send({"type": "http.response.body", "body": ANSWER})
            return
        await send(STREAM_START)
        async for _ in engine.generate(None, streamed, "r"):
            await send({"type": "http.response.body", "body": CHUNK, "more_body": True})
        await send({"type": "http.response.body", "body": b""})

    return app


async def one(app: Any, state: Any, headers: list[tuple[bytes, bytes]], body: bytes) -> None:
    """A request as the HTTP server would hand it over."""
    sent = False

    async def receive() -> dict[str, Any]:
        nonlocal sent
        if sent:
            await asyncio.get_running_loop().create_future()  # the client stays
        sent = True
        return {"type": "http.request", "body": body, "more_body": False}

    status = 0

    async def send(message: Any) -> None:
        nonlocal status
        status = message.get("status", status)

    scope = {
        "type": "http",
        "method": "POST",
        "path": PATH,
        "raw_path": PATH.encode(),
        "query_string": b"",
        "headers": headers,
        "app": state,
    }
    await app(scope, receive, send)
    assert status == 200, status


async def rate(request: Callable[[], Awaitable[None]], seconds: float) -> float:
    """Requests a second of `CLIENTS` clients that each ask again at once."""
    done, end = 0, time.perf_counter() + seconds

    async def client() -> None:
        nonlocal done
        while time.perf_counter() < end:
            await request()
            done += 1

    begun, cpu = time.perf_counter(), time.process_time()
    await asyncio.gather(*(client() for _ in range(CLIENTS)))
    took, worked = time.perf_counter() - begun, time.process_time() - cpu
    print(f"{done / took:.0f} a second; {done / worked:.0f} in a second of CPU time", file=sys.stderr)
    return done / took


async def measure(folder: Path, seconds: float, profile: cProfile.Profile | None) -> list[dict[str, Any]]:
    engine = Engine()
    replica, headers, registry = await serve(folder, engine)
    state = SimpleNamespace(state=SimpleNamespace(adapterhub=replica))
    inner = stub(engine)
    ours = TenancyMiddleware(inner)
    question = {"model": "acme/support@prod", "messages": [{"role": "user", "content": "Where is my parcel? " * 8}]}
    bodies = {False: json.dumps(question | {"max_tokens": 64}).encode()}
    bodies[True] = json.dumps(question | {"stream": True}).encode()
    rates = {}
    flushing = asyncio.create_task(replica.telemetry.metering.watch())  # type: ignore[union-attr]
    for stream in (False, True):
        for name, app in (("peer", inner), ("ours", ours)):
            await one(app, state, headers, bodies[stream])  # warm, and the adapter loaded
            if profile is not None and name == "ours" and not stream:
                profile.enable()
            rates[name, stream] = await rate(lambda app=app, s=stream: one(app, state, headers, bodies[s]), seconds)
            if profile is not None:
                profile.disable()
    flushing.cancel()
    await replica.telemetry.close()
    spans = {span: (quantile(registry, span, 0.5), quantile(registry, span, 0.99)) for span in SPANS}
    print("span: p50 and p99 in ms, at most:", spans, file=sys.stderr)
    p50, p99 = spans["all"]
    return [
        row("requests a second", rates["ours", False], rates["peer", False], "1/s", BARS["requests"]),
        row(
            "streamed chunks a second",
            CHUNKS * rates["ours", True],
            CHUNKS * rates["peer", True],
            "1/s",
            BARS["chunks"],
        ),
        late("time in our code, p50", p50, BARS["p50"]),
        late("time in our code, p99", p99, BARS["p99"]),
    ]


SPANS = ("admit", "resolve", "rewrite", "finish", "all")


async def serve(folder: Path, engine: Engine) -> tuple[Replica, list[tuple[bytes, bytes]], CollectorRegistry]:
    """A replica with one tenant and one adapter, and the headers of its key."""
    base = find_base(str(write_base(folder / "base", TINY, shards=1)))
    registry = open_registry((folder / "registry").as_uri())
    name = AdapterName("acme", "support")
    registry.publish(draft(write_adapter(folder / "adapter", TINY), base=base), name=name, author="bench")
    registry.set_channel(name, "prod", {1: 100}, who="bench")
    database = open_database(default_url(folder / "home"))
    tenants = Tenants(database)
    tenants.add(Tenant("acme", limits=Limits(requests_per_minute=MANY, tokens_per_minute=MANY, concurrency=MANY)))
    minted, _ = tenants.add_key("acme")
    config = ServeConfig(
        registry=registry.url,
        cache=folder / "cache",
        base=base.path,
        base_name="tiny",
        host="127.0.0.1",
        port=0,
        max_loras=4,
        max_cpu_loras=8,
        max_lora_rank=16,
    )
    metrics = CollectorRegistry()
    telemetry = Telemetry(Metrics(metrics), Metering(Ledger(database), folder / "usage", keyed=True))
    access = Access(lambda: asyncio.to_thread(tenants.changed))
    replica = Replica(config, registry=registry, base=base, engine=engine, access=access, telemetry=telemetry)
    await replica.access.look()
    gauges.connect(replica)
    replica.not_ready = ""
    headers = [
        (b"host", b"api.example"),
        (b"accept", b"application/json"),
        (b"content-type", b"application/json"),
        (b"user-agent", b"OpenAI/Python 2.0"),
        (b"x-stainless-lang", b"python"),
        (b"authorization", f"Bearer {minted.text}".encode()),
    ]
    return replica, headers, metrics


def quantile(registry: CollectorRegistry, span: str, share: float) -> float:
    """Milliseconds that at least ``share`` of the requests kept to: the bound of a bucket."""
    buckets = sorted(
        (float(sample.labels["le"]), sample.value)
        for family in registry.collect()
        for sample in family.samples
        if sample.name == "adapterhub_middleware_seconds_bucket" and sample.labels["span"] == span
    )
    total = buckets[-1][1]
    return 1000 * next(bound for bound, count in buckets if count >= share * total)


def row(what: str, ours: float, peer: float, unit: str, bar: float) -> dict[str, Any]:
    shown = {"ours": round(ours), "peer": round(peer), "ratio": round(ours / peer, 3), "unit": unit}
    return {"name": f"middleware alone: {what}", **shown, "bar": f">= {bar}", "met": ours >= bar, "machine": machine()}


def late(what: str, ours: float, bar: float) -> dict[str, Any]:
    shown = {"ours": ours, "peer": None, "ratio": None, "unit": "ms"}
    return {"name": f"middleware alone: {what}", **shown, "bar": f"<= {bar}", "met": ours <= bar, "machine": machine()}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--seconds", type=float, default=10, help="of each of four measurements")
    parser.add_argument("--profile", action="store_true", help="say on stderr where the time goes")
    options = parser.parse_args()
    os.sched_setaffinity(0, {max(os.sched_getaffinity(0))})  # one core, the ledger's thread on it too
    profile = cProfile.Profile() if options.profile else None
    with tempfile.TemporaryDirectory(prefix="ah-bench-") as folder:
        rows = uvloop.run(measure(Path(folder), options.seconds, profile))
    if profile is not None:
        pstats.Stats(profile, stream=sys.stderr).sort_stats("tottime").print_stats(60)
    print(json.dumps({"rows": rows}))
    return 0


if __name__ == "__main__":
    sys.exit(main())
