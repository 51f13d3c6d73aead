"""Mixed traffic of three tenants for an hour: swaps, clients that leave, bad requests; nothing may be wrong at the end.

Zero answers of a wrong version, zero 5xx that say not why, a ledger that equals the clients' own count to the token, no
growth of memory, files or sockets.

    python benchmarks/soak.py [--base DIR] [--minutes 60] [--swap-seconds 60]
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import os
import random
import sys
import tempfile
import time
from collections import Counter
from collections.abc import AsyncIterator, Callable, Collection, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
from clients import many
from engines import published, resident_bytes, serve
from machine import machine

from adapterhub.refs import AdapterName
from adapterhub.registry import Registry
from adapterhub.serving.database import default_url, open_database
from adapterhub.serving.tenants.callers import Scope
from adapterhub.serving.tenants.keys import Tenant
from adapterhub.serving.tenants.tenants import Tenants

TENANTS = ("acme", "globex", "initech")
PROMPTS = ("The sky is", "Count: one, two,", "My name is", "A river runs")
TOKENS = 4  # of an answer that is compared: further on two tokens may be equally likely, and a batch decides
STEADY, ROUGH = 2, 1  # clients of a tenant
GRACE = 15.0  # seconds in which a server may not have followed a move yet
GROWTH, SLACK = 1.05, 40 * 2**20  # of memory: a share, and bytes
FILES = 8  # more at the end than after the warm-up


@dataclass
class Place:
    """A running server with keys, and what belongs to it."""

    url: str
    registry: Registry
    keys: Mapping[str, str]  # "acme steady" → the key
    processes: Callable[[], list[int]]
    booked: Callable[[], Mapping[str, tuple[int, int, int]]]  # key id → requests, tokens in, tokens out


@dataclass
class Report:
    """What the clients saw."""

    statuses: Counter[int] = field(default_factory=Counter)
    problems: list[str] = field(default_factory=list)
    used: dict[str, list[int]] = field(default_factory=dict)  # key id → requests, tokens in, tokens out
    memory: tuple[int, int] = (0, 0)  # bytes after the warm-up, and at the end
    files: tuple[int, int] = (0, 0)  # open files, sockets among them
    moves: int = 0

    def of(self, what: str) -> int:
        return sum(problem.startswith(what) for problem in self.problems)


class Soak:
    """Clients, and what they expect."""

    def __init__(self, place: Place, *, seed: int = 0) -> None:
        self._place = place
        self._random = random.Random(seed)
        self._expected: dict[tuple[str, str], str] = {}  # version, prompt → text
        self._history: dict[str, list[tuple[float, int]]] = {}  # channel → moments of moves, and where to
        self.report = Report()

    async def run(self, *, seconds: float, swap_seconds: float) -> Report:
        """A fifth of the time warms up."""
        async with many(self._place.url) as self._http:
            await self._learn()
            async with self._traffic(swap_seconds):
                await asyncio.sleep(seconds / 5)
            memory, files = await self._quiet()
            async with self._traffic(swap_seconds):
                await asyncio.sleep(seconds * 4 / 5)
            end_memory, end_files = await self._quiet()
        self.report.memory, self.report.files = (memory, end_memory), (files, end_files)
        if end_memory > memory * GROWTH + SLACK:
            self.report.problems.append(f"growth: memory {memory} → {end_memory} bytes")
        if end_files > files + FILES:
            self.report.problems.append(f"growth: open files {files} → {end_files}")
        await self._compare_ledger()
        return self.report

    async def _learn(self) -> None:
        """What every version answers when it is alone."""
        for tenant in TENANTS:
            self._history[f"{tenant}/bot"] = [(0.0, 1)]
            for version in (1, 2):
                for prompt in PROMPTS:
                    model = f"{tenant}/bot@{version}"
                    answer = await self._post(tenant, "rough", "/v1/completions", completion(model, prompt))
                    self._expected[model, prompt] = answer.json()["choices"][0]["text"]

    @contextlib.asynccontextmanager
    async def _traffic(self, swap_seconds: float) -> AsyncIterator[None]:
        """Who is in the middle of a steady request finishes it: it is on the bill."""
        self._stop = asyncio.Event()
        clients = [self._steady(tenant) for tenant in TENANTS for _ in range(STEADY)]
        clients += [self._rough(tenant) for tenant in TENANTS for _ in range(ROUGH)]
        tasks = [asyncio.create_task(client) for client in (*clients, self._swap(swap_seconds))]
        try:
            yield
        finally:
            self._stop.set()
            await asyncio.gather(*tasks)

    async def _steady(self, tenant: str) -> None:
        """Whole requests by its own name, whose answers are compared and counted."""
        while not self._stop.is_set():
            prompt = self._random.choice(PROMPTS)
            body = completion(f"{tenant}/bot@prod", prompt) | {"stream": self._random.random() < 0.5}
            if body["stream"]:
                body["stream_options"] = {"include_usage": True}
            asked = time.monotonic()
            answer = await self._post(tenant, "steady", "/v1/completions", body)
            if answer.status_code == 200:
                self._look(tenant, prompt, answer, asked)

    def _look(self, tenant: str, prompt: str, answer: httpx.Response, asked: float) -> None:
        chunks = read(answer)
        usage = next(chunk["usage"] for chunk in reversed(chunks) if chunk.get("usage"))
        text = "".join(choice["text"] for chunk in chunks for choice in chunk["choices"])
        version = answer.headers["x-adapterhub-version"]
        if self._expected.get((version, prompt)) != text:
            self.report.problems.append(f"wrong: {version} said {text!r} to {prompt!r}")
        if version not in self._possible(f"{tenant}/bot", asked):
            self.report.problems.append(f"wrong: {version} is not what {tenant}/bot@prod was")
        used = self.report.used.setdefault(key_id(self._place.keys[f"{tenant} steady"]), [0, 0, 0])
        for place, count in enumerate((1, usage["prompt_tokens"], usage["completion_tokens"])):
            used[place] += count

    def _possible(self, name: str, asked: float) -> set[str]:
        """The versions that a channel may have meant from a while before a request until now."""
        history = self._history[name]
        ends = [moment for moment, _ in history[1:]] + [float("inf")]
        return {f"{name}@{to}" for (_, to), end in zip(history, ends, strict=True) if end > asked - GRACE}

    async def _rough(self, tenant: str) -> None:
        """Clients that leave, ask for what is not theirs, and send nonsense."""
        other = next(name for name in TENANTS if name != tenant)
        own = f"{tenant}/bot@prod"
        wrong: list[tuple[str, str, Any, set[int]]] = [
            ("cross-tenant", "/v1/completions", completion(f"{other}/bot@prod", "x"), {404}),
            ("unknown", "/v1/completions", completion(f"{tenant}/none", "x"), {404}),
            ("no name", "/v1/completions", completion("../../etc", "x"), {400}),
            ("huge n", "/v1/completions", completion(own, "x") | {"n": 10**9}, {400}),
            ("negative", "/v1/completions", completion(own, "x") | {"max_tokens": -5}, {400}),
            ("wrong type", "/v1/chat/completions", {"model": own, "messages": 7}, {400, 422}),
            ("too long", "/v1/completions", completion(own, "x " * 5000), {400}),
            ("no JSON", "/v1/completions", b"{", {400}),
            ("no route", "/v1/load_lora_adapter", {"lora_name": "x", "lora_path": "/"}, {404}),
            ("several", "/v1/completions", completion(own, "x") | {"n": 3, "temperature": 1}, {200}),
            (
                "messages",
                "/v1/messages",
                {"model": own, "messages": [{"role": "user", "content": "x"}], "max_tokens": 3},
                {200},
            ),
        ]
        while not self._stop.is_set():
            if self._random.random() < 0.4:
                await self._leave(tenant, own)
                continue
            kind, path, body, right = self._random.choice(wrong)
            answer = await self._post(tenant, "rough", path, body)
            if answer.status_code not in right and answer.status_code < 500:
                self.report.problems.append(f"odd: {kind} is answered with {answer.status_code}: {answer.text[:200]}")

    async def _leave(self, tenant: str, model: str) -> None:
        """In the middle of an answer."""
        body = completion(model, self._random.choice(PROMPTS)) | {"max_tokens": 200, "stream": True, "ignore_eos": True}
        headers = {"authorization": f"Bearer {self._place.keys[f'{tenant} rough']}"}
        async with self._http.stream("POST", "/v1/completions", json=body, headers=headers) as answer:
            self.report.statuses[answer.status_code] += 1
            after = self._random.randint(0, 8)
            lines = answer.aiter_lines()
            for _ in range(after):
                if await anext(lines, None) is None:
                    return

    async def _swap(self, seconds: float) -> None:
        """Moves one tenant's channel to its other version."""
        while not self._stop.is_set():
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._stop.wait(), seconds)
                return
            name = AdapterName(self._random.choice(TENANTS), "bot")
            to = 3 - self._history[str(name)][-1][1]
            await asyncio.to_thread(self._place.registry.set_channel, name, "prod", {to: 100}, who="soak")
            self._history[str(name)].append((time.monotonic(), to))
            self.report.moves += 1

    async def _post(self, tenant: str, kind: str, path: str, body: Any) -> httpx.Response:
        headers = {
            "authorization": f"Bearer {self._place.keys[f'{tenant} {kind}']}",
            "content-type": "application/json",
        }
        raw = body if isinstance(body, bytes) else json.dumps(body).encode()
        answer = await self._http.post(path, content=raw, headers=headers)
        self.report.statuses[answer.status_code] += 1
        if answer.status_code >= 500 and "is being loaded" not in answer.text:
            self.report.problems.append(f"5xx: {answer.status_code} {answer.text[:200]}")
        return answer

    async def _quiet(self) -> tuple[int, int]:
        """Memory and open files when nothing is under way; a connection that was left is closed a moment later."""
        await asyncio.sleep(3)
        processes = self._place.processes()
        return resident_bytes(processes), sum(len(list(Path(f"/proc/{pid}/fd").iterdir())) for pid in processes)

    async def _compare_ledger(self) -> None:
        """The last interval is booked a few seconds later."""
        deadline = time.monotonic() + 60
        while True:
            booked = await asyncio.to_thread(self._place.booked)
            different = {
                key: (booked.get(key), own) for key, own in self.report.used.items() if booked.get(key) != tuple(own)
            }
            if not different or time.monotonic() > deadline:
                break
            await asyncio.sleep(1)
        self.report.problems += [
            f"ledger: key {key}: booked {a}, clients counted {b}" for key, (a, b) in different.items()
        ]


def completion(model: str, prompt: str) -> dict[str, Any]:
    return {"model": model, "prompt": prompt, "max_tokens": TOKENS, "temperature": 0}


def read(answer: httpx.Response) -> list[Any]:
    """The objects of an answer, of a stream or whole."""
    if answer.headers["content-type"].startswith("text/event-stream"):
        return [json.loads(line[6:]) for line in answer.text.splitlines() if line.startswith("data: {")]
    return [answer.json()]


def key_id(key: str) -> str:
    return key.split("_")[1]


def prepare(database: str, *, scopes: Collection[Scope] = ("inference",)) -> dict[str, str]:
    """Tenants with two keys each: of what one asks for, all is counted."""
    tenants = Tenants(open_database(database))
    for name in TENANTS:
        tenants.add(Tenant(name))
    return {
        f"{name} {kind}": tenants.add_key(name, scopes=scopes)[0].text
        for name in TENANTS
        for kind in ("steady", "rough")
    }


def booked(database: str) -> dict[str, tuple[int, int, int]]:
    """What the ledger says, by key."""
    from datetime import UTC, datetime, timedelta

    from adapterhub.serving.bill.ledger import Ledger
    from adapterhub.serving.usage import summed

    now = datetime.now(UTC)
    rows = Ledger(open_database(database)).rows(since=now - timedelta(days=2), until=now + timedelta(hours=1))
    return {row["key"]: (row["requests"], row["tokens_in"], row["tokens_out"]) for row in summed(rows, by="key")}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--base", type=Path, default=Path(__file__).parents[1] / ".models" / "SmolLM2-135M-Instruct")
    parser.add_argument("--minutes", type=float, default=60)
    parser.add_argument("--swap-seconds", type=float, default=60)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="ah-soak-") as made:
        folder = Path(made)
        keys = prepare(default_url(folder))
        with serve(folder, options.base, database=default_url(folder), vllm_args=("--enforce-eager",)) as server:
            for number, tenant in enumerate(TENANTS):
                for version in (1, 2):
                    published(server, AdapterName(tenant, "bot"), seed=10 * number + version)
                server.registry.set_channel(AdapterName(tenant, "bot"), "prod", {1: 100}, who="soak")
            place = Place(server.url, server.registry, keys, server.processes, lambda: booked(default_url(folder)))
            soak = Soak(place)
            report = asyncio.run(soak.run(seconds=60 * options.minutes, swap_seconds=options.swap_seconds))
    for problem in report.problems[:50]:
        print("PROBLEM", problem, file=sys.stderr)
    print(json.dumps({"rows": list(rows(report))}))
    return 1 if report.problems else 0


def rows(report: Report) -> Iterator[dict[str, object]]:
    answers = sum(report.statuses.values())
    print(f"{answers} answers {dict(report.statuses)}, {report.moves} moves", file=sys.stderr)
    for what, name in (
        ("wrong", "answers of a wrong version"),
        ("5xx", "unexplained 5xx"),
        ("odd", "refusals that are not the right ones"),
        ("ledger", "keys whose bill is not what their clients counted"),
        ("growth", "growths of memory, files or sockets"),
    ):
        found = report.of(what)
        row = {"name": f"soak: {name}", "ours": found, "peer": answers, "ratio": None, "unit": "of answers", "bar": 0}
        yield row | {"met": not found, "machine": machine()}


if __name__ == "__main__":
    os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")  # GiB
    sys.exit(main())
