"""`ah serve` as a process: how it ends, and what it leaves behind. Engines of its own, because they are killed."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from datetime import UTC, datetime, timedelta
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import httpx
import pytest
import soak
from engines import write_adapter

from adapterhub.base import find_base
from adapterhub.refs import AdapterName, AdapterRef
from adapterhub.registry import Registry, draft, open_registry
from adapterhub.registry.views import rollouts
from adapterhub.serving.bill.ledger import Ledger
from adapterhub.serving.database import default_url, open_database
from adapterhub.serving.engine.guard import session_processes
from adapterhub.serving.rollout.webhook import signature

pytestmark = pytest.mark.engine
SECRET = "s3cret"
GATES = {"min_score": 0.9}


class Served:
    """A running `ah serve`, with what it said."""

    def __init__(self, base: Path, folder: Path, *, key: str = "", more: Sequence[str] = ()) -> None:
        self.headers = {"authorization": f"Bearer {key}"} if key else {}
        self._said = folder / "said.txt"
        with self._said.open("wb") as said:
            registry = (folder / "registry").as_uri()
            flags = ["--base", base, "--port", "0", "--registry", registry, "--max-model-len", "512"]
            flags += ["--dtype", "float32", "--drain-seconds", "600", *more]
            self.process = subprocess.Popen(
                [sys.executable, "-m", "adapterhub.cli.main", "serve", *flags, "--", "--enforce-eager"],
                env=os.environ
                | {"VLLM_CPU_KVCACHE_SPACE": "1", "AH_HOME": str(folder / "home"), "AH_WEBHOOK_SECRET": SECRET},
                stderr=said,
            )
        self.until(self._children)
        self.guard = self._children()[0]

    @property
    def said(self) -> str:
        return self._said.read_text()

    def ready(self) -> str:
        """The URL, once it answers."""
        said = re.compile(r"ready after \d+ s: (http://\S+)/v1")
        self.until(lambda: said.search(self.said) or self.process.poll() is not None, seconds=300)
        url = said.search(self.said)
        assert url, self.said
        return url[1]

    @contextlib.contextmanager
    def stream(self, url: str) -> Iterator[Iterator[Any]]:
        """The chunks of an answer of 450 tokens, from its second on."""
        body = {"model": "base", "prompt": "a", "max_tokens": 450, "stream": True, "ignore_eos": True}
        options = {"json": body, "headers": self.headers, "timeout": 60}
        with httpx.stream("POST", f"{url}/v1/completions", **options) as answer:
            chunks = (json.loads(line[6:]) for line in answer.iter_lines() if line.startswith("data: {"))
            assert next(chunks)["choices"]
            yield chunks

    def engine(self) -> list[int]:
        return session_processes(self.guard)

    def until(self, condition: Callable[[], object], *, seconds: float = 60) -> None:
        deadline = time.monotonic() + seconds
        while not condition():
            assert time.monotonic() < deadline, self.said
            time.sleep(0.05)

    def _children(self) -> list[int]:
        path = Path(f"/proc/{self.process.pid}/task/{self.process.pid}/children")
        return [int(pid) for pid in path.read_text().split()]

    def end(self) -> None:
        self.process.kill()
        self.process.wait()
        self.until(lambda: not self.engine())


@pytest.fixture
def serve(base_dir: Path, tmp_path: Path) -> Iterator[Served]:
    served = Served(base_dir, tmp_path)
    try:
        yield served
    finally:
        served.end()


@pytest.fixture
def tenants(tmp_path: Path) -> dict[str, str]:
    """Their keys; made before the server starts, so that it asks for them."""
    return soak.prepare(default_url(tmp_path / "home"), scopes={"inference", "admin"})


class Hook:
    """Takes what a server tells."""

    def __init__(self) -> None:
        told = self.told = list[tuple[dict[str, str], bytes]]()

        class Taking(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                told.append(
                    (
                        {name.lower(): value for name, value in self.headers.items()},
                        self.rfile.read(int(self.headers["content-length"])),
                    )
                )
                self.send_response(204)
                self.end_headers()

            def log_message(self, format: str, *args: object) -> None:
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Taking)
        self.url = f"http://127.0.0.1:{self.server.server_port}/hook"

    def events(self) -> list[dict[str, Any]]:
        return [json.loads(body) for _, body in self.told]


@pytest.fixture
def hook() -> Iterator[Hook]:
    hook = Hook()
    thread = threading.Thread(target=hook.server.serve_forever, args=(0.05,))
    thread.start()
    yield hook
    hook.server.shutdown()
    thread.join()
    hook.server.server_close()


@pytest.fixture
def keyed(tenants: dict[str, str], base_dir: Path, tmp_path: Path, hook: Hook) -> Iterator[Served]:
    """A server for the soak's tenants, with two versions of an adapter each, and one prompt that neither answers."""
    (tmp_path / "prompts" / "acme").mkdir(parents=True)
    (tmp_path / "prompts" / "acme" / "bot.jsonl").write_text('{"prompt": "Hi", "expected": "Paris", "max_tokens": 2}\n')
    registry, base = open_registry((tmp_path / "registry").as_uri()), find_base(str(base_dir))
    for number, tenant in enumerate(soak.TENANTS):
        for version in (1, 2):
            path = write_adapter(tmp_path / f"{tenant}-{version}", base, seed=10 * number + version)
            registry.publish(draft(path, base=base), name=AdapterName(tenant, "bot"), author="tests")
        registry.set_channel(AdapterName(tenant, "bot"), "prod", {1: 100}, who="tests")
    more = ["--prompts", str(tmp_path / "prompts"), "--webhook", hook.url, "--log-format", "json"]
    served = Served(base_dir, tmp_path, key=tenants["acme rough"], more=more)
    try:
        yield served
    finally:
        served.end()


def test_the_life_of_a_server(keyed: Served, tenants: dict[str, str], tmp_path: Path, hook: Hook) -> None:
    """Mixed traffic, then a poor candidate, a crash and a stop: each start of the engine takes half a minute."""
    url, database = keyed.ready(), default_url(tmp_path / "home")
    registry = open_registry((tmp_path / "registry").as_uri())
    place = soak.Place(url, registry, tenants, keyed.engine, lambda: soak.booked(database))
    report = asyncio.run(soak.Soak(place).run(seconds=20, swap_seconds=3))
    assert report.problems == []
    assert report.moves >= 2 and report.statuses[200] > 20 and report.statuses[404] > 0
    a_poor_candidate_goes_back_and_somebody_is_told(keyed, registry, hook)
    it_comes_back_after_a_crash(keyed, url, tmp_path)
    a_stop_lets_requests_finish(keyed, url, tmp_path / "home")
    the_log_is_for_machines_and_says_nothing_of_prompts(keyed.said)


def a_poor_candidate_goes_back_and_somebody_is_told(serve: Served, registry: Registry, hook: Hook) -> None:
    name = AdapterName("acme", "bot")
    stable = registry.resolve(AdapterRef.parse("acme/bot@prod")).record.version
    rollouts.start(registry, name=name, channel="prod", candidate=3 - stable, weight=50, gates=GATES, who="tests")
    serve.until(lambda: "canary.rollback" in {event["event"] for event in hook.events()})
    headers, body = hook.told[-1]
    event = json.loads(body)
    assert (event["to"], event["who"]) == ({f"acme/bot@{stable}": 100}, "ah serve")
    assert "it scores 0 on the prompts" in event["why"]
    assert headers["x-adapterhub-signature"] == f"sha256={signature(SECRET, headers['x-adapterhub-timestamp'], body)}"


def the_log_is_for_machines_and_says_nothing_of_prompts(said: str) -> None:
    lines = [json.loads(line) for line in said.splitlines()]
    answered = [line for line in lines if line["logger"] == "adapterhub.requests" and line["outcome"] == "ok"]
    assert len(answered) > 20
    assert all(line["tenant"] and line["request_id"] and line["ms"] > 0 for line in answered)
    assert not [prompt for prompt in soak.PROMPTS if prompt in said]


def it_comes_back_after_a_crash(serve: Served, url: str, folder: Path) -> None:
    held = set(loaded(serve, url))
    kept = folder / "home" / "cache" / "working-sets"
    serve.until(lambda: all(name in "".join(f.read_text() for f in kept.glob("*.json")) for name in held))
    with serve.stream(url) as chunks:
        core = next(pid for pid in serve.engine() if "EngineCore" in Path(f"/proc/{pid}/cmdline").read_text())
        os.kill(core, signal.SIGKILL)
        with pytest.raises((httpx.TransportError, AssertionError)):
            assert [chunk for chunk in chunks if "error" in chunk] == []
            raise AssertionError("the stream ended as if it were whole")
    refusals, resets = [], []

    def is_back() -> bool:
        """No connection is refused in between; one that came in the very instant of a change may be reset."""
        try:
            answer = ask(serve, url)
        except (httpx.ReadError, httpx.RemoteProtocolError) as reset:
            resets.append(reset)
            return False
        refusals.append(answer)
        return answer.status_code == 200

    serve.until(is_back, seconds=300)
    assert {(a.status_code, a.headers["retry-after"]) for a in refusals[:-1]} == {(503, "5")}
    assert len(resets) <= 2 < len(refusals)
    assert "starting it again in 1 s (1 of 5)" in serve.said
    serve.until(lambda: set(loaded(serve, url)) == held)


def a_stop_lets_requests_finish(serve: Served, url: str, home: Path) -> None:
    with serve.stream(url) as chunks:
        serve.process.send_signal(signal.SIGTERM)
        serve.until(lambda: httpx.get(f"{url}/ready").status_code == 503)
        refused = ask(serve, url)
        assert refused.status_code == 503
        assert (refused.headers["retry-after"], refused.headers["connection"]) == ("5", "close")
        rest = list(chunks)
    assert rest[-1]["choices"][0]["finish_reason"] == "length", "it was cut off"
    assert serve.process.wait(timeout=60) == 0
    assert serve.engine() == []
    assert not list((home / "usage").iterdir()), "usage that is not booked"
    ledger, now = Ledger(open_database(default_url(home))), datetime.now(UTC)
    rows = ledger.rows(since=now - timedelta(days=1), until=now + timedelta(days=1))
    assert sum(counts.tokens_out for _, line, counts in rows if line.adapter == "base") >= 450


def ask(serve: Served, url: str) -> httpx.Response:
    return httpx.post(f"{url}/v1/completions", json={"model": "base", "prompt": "a"}, headers=serve.headers, timeout=60)


def loaded(serve: Served, url: str) -> list[str]:
    return [entry["model"] for entry in httpx.get(f"{url}/adapterhub/loaded", headers=serve.headers).json()]


def test_ctrl_c_twice_ends_every_process_at_once(serve: Served) -> None:
    url = serve.ready()
    assert "curl " in serve.said
    assert "no API keys" in serve.said
    assert httpx.get(f"{url}/v1/models", trust_env=False).json()["data"][0]["id"] == "base"
    assert len(serve.engine()) >= 4  # guard, API server, engine core, worker
    with serve.stream(url) as chunks:
        serve.process.send_signal(signal.SIGINT)
        serve.until(lambda: "finishing what runs" in serve.said)
        serve.process.send_signal(signal.SIGINT)
        with pytest.raises((httpx.TransportError, AssertionError)):
            assert len(list(chunks)) >= 449, "cut off"
            raise AssertionError("it was let to finish")
    assert serve.process.wait(timeout=60) == 0
    assert serve.engine() == []
    with pytest.raises(httpx.ConnectError):
        httpx.get(url, trust_env=False)


def test_sigterm_while_it_starts_ends_every_process(serve: Served) -> None:
    serve.until(lambda: len(serve.engine()) >= 2)
    serve.process.send_signal(signal.SIGTERM)
    assert serve.process.wait(timeout=60) == 0
    assert serve.engine() == []
