"""Who gets how much of a full engine: four tenants with 16 clients, one with 64, and five with one client each.

The first five always have requests waiting. Ours is Jain's index of their tokens, (Σx)² / (n Σx²); the peer is the
stock engine with the same flags and our LoRA product. Of the five small tenants, the time to the first token (p95),
against the same server with one client a tenant. Tokens of all tenants together, against stock.

    python benchmarks/fairness.py [--base DIR] [--seconds 60] [--max-loras 10] [--only ours|stock]
        [-- --max-num-seqs 16]
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import random
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import httpx
from engines import WORDS, serve, stock, write_adapter
from machine import machine

from adapterhub.base import find_base
from adapterhub.refs import AdapterName
from adapterhub.registry import draft

CLIENTS = {**{f"busy{n}": 16 for n in range(4)}, "noisy": 64, **{f"small{n}": 1 for n in range(5)}}
BACKLOGGED = [tenant for tenant, clients in CLIENTS.items() if clients > 1]
SMALL = [tenant for tenant, clients in CLIENTS.items() if clients == 1]
QUIET = dict.fromkeys(CLIENTS, 1)
TOKENS = 32
WARM_UP = 15  # seconds: more than the first answers take, sixteen at once
BARS = {"jain": 0.95, "first token": 2.0, "tokens": 0.9}


@dataclass
class Served:
    """What one tenant got while it was measured."""

    tokens: int = 0
    first_token: list[float] = field(default_factory=list)  # seconds


@dataclass(frozen=True)
class Side:
    """One server, quiet and full."""

    quiet: Mapping[str, Served]
    full: Mapping[str, Served]

    @property
    def jain(self) -> float:
        return jain([self.full[tenant].tokens for tenant in BACKLOGGED])

    @property
    def tokens(self) -> int:
        return sum(served.tokens for served in self.full.values())

    @property
    def slowdown(self) -> float:
        """Of the small tenants' p95 time to the first token."""
        return p95(self.full) / p95(self.quiet)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--base", type=Path, default=Path(__file__).parents[1] / ".models" / "SmolLM2-135M-Instruct")
    parser.add_argument("--seconds", type=float, default=60, help="measured, for each of four runs")
    parser.add_argument("--max-loras", type=int, default=len(CLIENTS), help="slots for adapters; each tenant has one")
    parser.add_argument("--only", choices=("ours", "stock"), help="one side, where there is no time for both")
    parser.add_argument("vllm_args", nargs="*", default=["--max-num-seqs", "16"], metavar="-- VLLM FLAGS")
    options = parser.parse_args()
    flags, slots = tuple(options.vllm_args), options.max_loras
    with tempfile.TemporaryDirectory() as made:
        folder, base = Path(made), find_base(str(options.base))
        paths = {tenant: write_adapter(folder / tenant, base, seed=n) for n, tenant in enumerate(CLIENTS)}
        ours = peer = None
        if options.only != "stock":
            with serve(folder / "ours", options.base, max_loras=slots, vllm_args=flags) as server:
                for tenant, path in paths.items():
                    name = AdapterName(tenant, "bot")
                    server.registry.publish(draft(path, base=base), name=name, author="bench")
                ours = measure(server.url, {tenant: f"{tenant}/bot" for tenant in CLIENTS}, options.seconds)
        if options.only != "ours":
            kept = {"adapters": paths, "max_loras": slots, "our_product": True, "vllm_args": flags}
            with stock(folder, options.base, **kept) as http:
                peer = measure(str(http.base_url), {tenant: tenant for tenant in CLIENTS}, options.seconds)
    print(json.dumps({"rows": rows(ours, peer)}))
    return 0


def measure(url: str, models: Mapping[str, str], seconds: float) -> Side:
    quiet = asyncio.run(run(url, models, QUIET, seconds))
    full = asyncio.run(run(url, models, CLIENTS, seconds))
    for what, served in (("quiet", quiet), ("full", full)):
        shown = {tenant: (s.tokens, len(s.first_token)) for tenant, s in served.items()}
        print(f"{what}: tokens and answers by tenant {shown}", file=sys.stderr)
        print(f"{what}: p95 of the small tenants {p95(served):.3f} s", file=sys.stderr)
    return Side(quiet, full)


async def run(url: str, models: Mapping[str, str], clients: Mapping[str, int], seconds: float) -> dict[str, Served]:
    """Every client asks again as soon as it has its answer, and leaves at the end.

    What comes while it warms up is not counted: whoever comes first has all of an idle engine, and keeps it until the
    first answers end.
    """
    served = {tenant: Served() for tenant in models}
    begin = time.perf_counter() + WARM_UP
    end = begin + seconds
    limits = httpx.Limits(max_connections=None)
    async with httpx.AsyncClient(base_url=url, timeout=600, limits=limits, trust_env=False) as http:

        async def client(tenant: str, number: int) -> None:
            prompts = random.Random(f"{tenant} {number} {sum(clients.values())}")
            while True:
                prompt = " ".join(prompts.choices(WORDS, k=40))
                await ask(http, models[tenant], prompt, served[tenant], begin=begin, end=end)

        everybody = [(tenant, number) for tenant, count in clients.items() for number in range(count)]
        random.Random(0).shuffle(everybody)
        tasks = [asyncio.create_task(client(*one)) for one in everybody]
        failed, _ = await asyncio.wait(tasks, timeout=end - time.perf_counter(), return_when=asyncio.FIRST_EXCEPTION)
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        for task in failed:
            task.result()
    return served


async def ask(http: httpx.AsyncClient, model: str, prompt: str, served: Served, *, begin: float, end: float) -> None:
    """One streamed answer; a token counts when it comes between ``begin`` and ``end``.

    Who leaves without a first token has waited at least so long.
    """
    body = {"model": model, "messages": [{"role": "user", "content": prompt}], "max_tokens": TOKENS, "stream": True}
    asked, is_first = time.perf_counter(), True
    try:
        options = {"temperature": 0, "ignore_eos": True}
        async with http.stream("POST", "/v1/chat/completions", json=body | options) as answer:
            answer.raise_for_status()
            async for line in answer.aiter_lines():
                if not line.startswith("data: {") or '"role"' in line:
                    continue
                now = time.perf_counter()
                served.tokens += begin <= now < end
                if is_first and begin <= now < end:
                    served.first_token.append(now - asked)
                is_first = False
    except asyncio.CancelledError:
        if is_first:
            served.first_token.append(time.perf_counter() - asked)
        raise


def rows(ours: Side | None, peer: Side | None) -> list[dict[str, object]]:
    """None: that side was not measured."""

    def row(
        what: str, of: Callable[[Side], float], unit: str, bar: str, met: Callable[[float], bool]
    ) -> dict[str, object]:
        a, b = (None if side is None else of(side) for side in (ours, peer))
        shown = {"ours": a and round(a, 3), "peer": b and round(b, 3), "ratio": round(a / b, 2) if a and b else None}
        judged = None if a is None else met(a)
        return {"name": f"fairness: {what}", **shown, "unit": unit, "bar": bar, "met": judged, "machine": machine()}

    index, slow, tokens = BARS["jain"], BARS["first token"], BARS["tokens"]
    total = row(
        "tokens of all tenants",
        lambda side: side.tokens,
        "tokens",
        f">= {tokens} x stock",
        lambda ours: peer is not None and ours >= tokens * peer.tokens,
    )
    return [
        row(
            "Jain's index of five backlogged tenants",
            lambda side: side.jain,
            "",
            f">= {index}",
            lambda ours: ours >= index,
        ),
        row(
            "p95 first token of small tenants, against one client everywhere",
            lambda side: side.slowdown,
            "x",
            f"<= {slow}",
            lambda ours: ours <= slow,
        ),
        total | ({} if ours and peer else {"met": None}),
    ]


def jain(shares: Sequence[float]) -> float:
    """Jain, Chiu and Hawe 1984: 1 where all are equal, 1/n where one has everything."""
    return sum(shares) ** 2 / (len(shares) * sum(share**2 for share in shares))


def p95(served: Mapping[str, Served]) -> float:
    """Of the small tenants' times to the first token, in seconds."""
    times = sorted(t for tenant in SMALL for t in served[tenant].first_token)
    if not times:
        sys.exit("error: no small tenant was answered; measure longer: --seconds 120")
    return times[min(len(times) - 1, int(0.95 * len(times)))]


if __name__ == "__main__":
    os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "2")  # GiB
    sys.exit(main())
