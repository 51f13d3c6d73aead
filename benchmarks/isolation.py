"""A thousand tries of one tenant to reach what is another's, on the real engine with keys on.

Of every kind: names of models on every route, all routes that the engine registers by many spellings, stored
responses, keys that are almost right, fields that reach past the request, the admin API, HTTP/1.0, websockets. A leak
is an answer that succeeds, names the other tenant where the try did not, or holds its digest or a path. What is
forbidden and what is absent must get the same body, and take the same time (Mann-Whitney, |z| < 3).
"""

from __future__ import annotations

import argparse
import json
import math
import random
import socket
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from engines import Server, published, serve
from machine import machine

from adapterhub.refs import AdapterName
from adapterhub.serving.database import default_url, open_database
from adapterhub.serving.tenants.keys import Tenant
from adapterhub.serving.tenants.tenants import Tenants

SPELLINGS = ("{}", "{}/", "/{}", "//{}", "{}?x=1", "/.{}", "/v1/..{}", "{}%2f", "{}%00", "{};x", "{}/.", "/%2e{}")
VICTIM = "globex"
BODIES: dict[str, dict[str, Any]] = {
    "/v1/chat/completions": {"messages": [{"role": "user", "content": "x"}], "max_tokens": 1},
    "/v1/completions": {"prompt": "x", "max_tokens": 1},
    "/v1/messages": {"messages": [{"role": "user", "content": "x"}], "max_tokens": 1},
    "/v1/responses": {"input": "x", "max_output_tokens": 1},
    "/v1/messages/count_tokens": {"messages": [{"role": "user", "content": "x"}]},
    "/tokenize": {"prompt": "x"},
    "/detokenize": {"tokens": [1]},
}


@dataclass(frozen=True)
class Try:
    """One request, byte for byte."""

    method: str
    path: str
    headers: dict[str, str] = field(default_factory=dict)
    body: Any = None
    version: str = "1.1"


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--base", type=Path, default=Path(__file__).parents[1] / ".models" / "SmolLM2-135M-Instruct")
    parser.add_argument("--tries", type=int, default=1000)
    parser.add_argument("--pairs", type=int, default=400, help="of timed refusals")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="ah-bench-") as temporary:
        folder = Path(temporary)
        tenants = Tenants(open_database(default_url(folder)))
        for name in ("acme", VICTIM):
            tenants.add(Tenant(name))
        keys = {name: tenants.add_key(name)[0].text for name in ("acme", VICTIM)}
        with serve(folder, arguments.base, database=default_url(folder), vllm_args=("--enforce-eager",)) as server:
            digest = published(server, AdapterName(VICTIM, "desk"), seed=1).digest.removeprefix("sha256:")
            server.registry.set_channel(AdapterName(VICTIM, "desk"), "prod", {1: 100}, who="bench")
            used = ask(server, keys[VICTIM], f"{VICTIM}/desk@prod")  # it is known, loaded, and in the metrics
            assert used[0] == 200, used
            tries = list(all_tries(server, keys["acme"]))
            chosen = random.Random(0).sample(tries, min(arguments.tries, len(tries)))
            leaks = [(t, a) for t in chosen if (a := leak(server, t, digest))]
            same_body, z = compare(server, keys["acme"], pairs=arguments.pairs)
    for wrong in leaks[:20]:
        print("LEAK", *wrong)
    fine = not leaks and same_body and abs(z) < 3
    row = {"name": "isolation: cross-tenant tries", "ours": len(leaks), "peer": len(chosen), "ratio": None}
    row |= {"unit": f"leaks of tries (same bodies: {same_body}, z of times {z:.1f})", "bar": 0, "met": fine}
    print(json.dumps(row | {"machine": machine()}))


def all_tries(server: Server, key: str) -> Iterator[Try]:
    """Whose key it is may use none of it."""
    bearer = {"authorization": f"Bearer {key}"}
    names = [f"{VICTIM}/desk", f"{VICTIM}/desk@1", f"{VICTIM}/desk@prod", f"{VICTIM}/desk@latest", f"{VICTIM}/none"]
    odd = [
        f"{VICTIM.upper()}/desk",
        f"acme/../{VICTIM}/desk",
        f"{VICTIM}/desk@1\x00",
        f" {VICTIM}/desk",
        f"{VICTIM}//desk",
    ]
    for path, body in BODIES.items():
        for name in names + odd:
            yield Try("POST", path, bearer, body | {"model": name})
        for fields in ({"lora_request": {"lora_name": f"{VICTIM}/desk@1"}}, {"lora_path": "/"}, {"adapter_id": VICTIM}):
            yield Try("POST", path, bearer, body | {"model": f"{VICTIM}/desk@1"} | fields)
        for almost in (key[:-1] + "A", key.upper(), key[:40], "", key + "\t" + key):
            for headers in ({"authorization": f"Bearer {almost}"}, {"x-api-key": almost}, {"cookie": almost}):
                yield Try("POST", path, headers, body | {"model": f"{VICTIM}/desk@1"})
        yield Try("POST", path, bearer | {"x-api-key": "ah_x"}, body | {"model": "base"})
        for version in ("1.0", "1.1"):
            yield Try("POST", path, bearer, body | {"model": f"{VICTIM}/desk@prod"}, version)
    for fields in ({"previous_response_id": "resp_1"}, {"background": True}, {"request_id": "resp_1"}):
        yield Try("POST", "/v1/responses", bearer, {"model": "base", "input": "x"} | fields)
    lines = server.log.read_text().splitlines()
    routes = {line.split("Route: ")[1].split(",")[0] for line in lines if "Route: " in line}
    routes |= {
        "/v1/load_lora_adapter",
        "/v1/unload_lora_adapter",
        "/adapters",
        "/adapters/x",
        "/invocations",
        "/metrics/",
    }
    open_ = {*BODIES, "/health", "/ready", "/version", "/v1/models", "/metrics", "/v1/embeddings"}
    for route in sorted(routes - open_):
        path = route.replace("{response_id}", "resp_1")
        for spelling in SPELLINGS:
            for method in ("GET", "POST"):
                yield Try(method, spelling.format(path), bearer, {"name": "x", "src": "/", "lora_path": "/"})
        for override in ("x-http-method-override", "x-method-override", "x-original-url", "x-rewrite-url"):
            yield Try("POST", "/v1/models", bearer | {override: path}, {})
        yield Try("GET", path, bearer | {"upgrade": "websocket", "connection": "Upgrade", "sec-websocket-version": "13",
                                         "sec-websocket-key": "AAAAAAAAAAAAAAAAAAAAAA=="})  # fmt: skip
    for path in ("/v1/models", "/metrics", "/adapterhub/loaded", "/adapterhub/state", "/adapterhub/config"):
        yield Try("GET", path, bearer)
    for path in ("load", "pin", "forget", "channels"):
        yield Try("POST", f"/adapterhub/{path}", bearer, {"model": f"{VICTIM}/desk@1"})


def leak(server: Server, tried: Try, digest: str) -> str:
    """What was wrong with the answer; empty where nothing was."""
    status, text = send(server, tried)
    listing = tried.method == "GET" and tried.path in ("/v1/models", "/metrics")
    if 200 <= status < 300 and not listing:
        return f"{status} {text[:200]}"
    if digest in text or (VICTIM in text.lower() and VICTIM not in repr(tried).lower()):  # what it named comes back
        return f"tells of the other tenant: {text[:200]}"
    if str(server.folder) in text or "/site-packages/" in text:
        return f"a path: {text[:200]}"
    return "" if 200 <= status < 500 or status == 0 else f"{status} {text[:200]}"


def send(server: Server, tried: Try) -> tuple[int, str]:
    """Status and the rest; 0 where the server hung up."""
    address = urlsplit(server.url)
    raw = b"" if tried.body is None else json.dumps(tried.body).encode()
    headers = {"host": "any.example", "connection": "close", "content-type": "application/json"} | tried.headers
    lines = [f"{tried.method} {tried.path} HTTP/{tried.version}", *(f"{k}: {v}" for k, v in headers.items())]
    lines.append(f"content-length: {len(raw)}")
    with socket.create_connection((address.hostname, address.port), timeout=60) as connection:
        connection.sendall("\r\n".join([*lines, "", ""]).encode("latin-1") + raw)
        answer = b""
        try:
            while part := connection.recv(65536):
                answer += part
        except ConnectionResetError:
            pass
    head = answer.split(b" ", 2)
    return (int(head[1]), answer.decode(errors="replace")) if len(head) > 1 else (0, "")


def ask(server: Server, key: str, model: str) -> tuple[int, str]:
    body = BODIES["/v1/chat/completions"] | {"model": model}
    answer = server.http.post("/v1/chat/completions", json=body, headers={"authorization": f"Bearer {key}"})
    return answer.status_code, answer.text


def compare(server: Server, key: str, *, pairs: int) -> tuple[bool, float]:
    """Whether refusals of what is forbidden and what is absent have one body; and the z of their times."""
    times: dict[str, list[float]] = {"desk": [], "none": []}
    bodies = set()
    for i in range(pairs):
        for name in ("desk", "none") if i % 2 else ("none", "desk"):
            begun = time.perf_counter()
            status, text = ask(server, key, f"{VICTIM}/{name}@1")
            times[name].append(time.perf_counter() - begun)
            bodies.add((status, text.replace(name, "NAME")))
    return len(bodies) == 1 and next(iter(bodies))[0] == 404, mann_whitney(times["desk"], times["none"])


def mann_whitney(one: list[float], other: list[float]) -> float:
    """The normal deviate of the rank sum (Mann and Whitney, 1947)."""
    n, m = len(one), len(other)
    ranks = sorted([(t, True) for t in one] + [(t, False) for t in other])
    u = sum(rank for rank, (_, first) in enumerate(ranks, 1) if first) - n * (n + 1) / 2
    return (u - n * m / 2) / math.sqrt(n * m * (n + m + 1) / 12)


if __name__ == "__main__":
    main()
