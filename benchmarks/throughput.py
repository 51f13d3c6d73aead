"""Tokens per second of 32 clients on four adapters that are loaded, with everything of ours on.

Ours is `ah serve` with keys, limits, fairness, metering and tenants. The peer is stock vLLM with `--lora-modules`, the
same flags and our LoRA product. The two take turns of a few requests a client, and what counts is the median turn.

    python benchmarks/throughput.py [--base DIR] [--rounds 3] [--requests 64] [--tokens 32]
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import sys
import tempfile
from pathlib import Path
from statistics import median

from clients import crowd
from engines import serve, stock, write_adapter
from machine import machine

from adapterhub.base import find_base
from adapterhub.refs import AdapterName
from adapterhub.registry import draft
from adapterhub.serving.database import default_url, open_database
from adapterhub.serving.tenants.callers import Limits
from adapterhub.serving.tenants.keys import Tenant
from adapterhub.serving.tenants.tenants import Tenants

CLIENTS, WORDS = 32, 20
NAMES = [AdapterName("acme", name) for name in ("one", "two", "three", "four")]
BAR = 0.97


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--base", type=Path, default=Path(__file__).parents[1] / ".models" / "SmolLM2-135M-Instruct")
    parser.add_argument("--rounds", type=int, default=3, help="turns of each side")
    parser.add_argument("--requests", type=int, default=64, help="in a turn, of all clients together")
    parser.add_argument("--tokens", type=int, default=32, help="of an answer")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as made:
        folder, base = Path(made), find_base(str(options.base))
        paths = {name.adapter: write_adapter(folder / name.adapter, base, seed=n) for n, name in enumerate(NAMES)}
        tenants = Tenants(open_database(default_url(folder)))
        plenty = Limits(requests_per_minute=10**6, tokens_per_minute=10**9, concurrency=1000, queue=1000)
        tenants.add(Tenant("acme", limits=plenty))
        key = tenants.add_key("acme")[0].text
        ours, peer = [], []
        with serve(folder / "ours", options.base, database=default_url(folder)) as server:
            for name in NAMES:
                server.registry.publish(draft(paths[name.adapter], base=base), name=name, author="bench")
            turn = Turn(server.url, [str(name) for name in NAMES], options, key=key)
            with stock(folder, options.base, adapters=paths, our_product=True) as http:
                other = Turn(str(http.base_url), list(paths), options)
                for side in (turn, other):
                    side.take()  # warm
                for _ in range(options.rounds):
                    ours.append(turn.take())
                    peer.append(other.take())
    print(f"tokens/s by turn: ours {ours}, stock {peer}", file=sys.stderr)
    ratio = median(a / b for a, b in zip(ours, peer, strict=True))  # of neighbours: the machine changes with time
    row = {"name": "throughput: 32 clients, everything on", "ours": round(median(ours), 1)}
    row |= {"peer": round(median(peer), 1), "ratio": round(ratio, 3), "unit": "tokens/s", "bar": f">= {BAR} x stock"}
    print(json.dumps(row | {"met": ratio >= BAR, "machine": machine()}))
    return 0


class Turn:
    """One side of the measurement."""

    def __init__(self, url: str, models: list[str], options: argparse.Namespace, *, key: str = "") -> None:
        self._url, self._models, self._options = url, models, options
        self._headers = {"authorization": f"Bearer {key}"} if key else {}
        self._taken = 0

    def take(self) -> float:
        """Tokens per second. Prompts are new each time, so that no side answers from its cache."""
        o, self._taken = self._options, self._taken + 1
        first = self._taken * o.requests

        async def run() -> float:
            streams, seconds = await crowd(
                self._url,
                clients=CLIENTS,
                requests=o.requests,
                model=lambda n: self._models[n % len(self._models)],
                words=WORDS,
                tokens=o.tokens,
                headers=self._headers,
                seed=first,
            )
            assert all(s.status == 200 and len(s.tokens) >= o.tokens for s in streams), "an answer is not whole"
            return o.requests * o.tokens / seconds

        return asyncio.run(run())


if __name__ == "__main__":
    os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")  # GiB
    sys.exit(main())
