"""200 adapters asked for by Zipf's law on four slots: time to the first token (p99), errors, memory that stays flat.

Ours is `ah serve` from its registry. The peer is stock vLLM with its file-system resolver on the same files, the same
flags, room for as many adapters, and our LoRA product. Both begin with nothing loaded.

    python benchmarks/many_adapters.py [--base DIR] [--adapters 200] [--requests 300]
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import random
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

from clients import Stream, ask, crowd, many, quantile
from engines import resident_bytes, serve, stock, write_adapter
from machine import machine

from adapterhub.base import find_base
from adapterhub.refs import AdapterName
from adapterhub.registry import draft

CLIENTS, WORDS, TOKENS, RANK = 8, 12, 8, 4
EXPONENT = 1.1
FLAT = 1.03  # memory at the end over that after the warm-up


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--base", type=Path, default=Path(__file__).parents[1] / ".models" / "SmolLM2-135M-Instruct")
    parser.add_argument("--adapters", type=int, default=200)
    parser.add_argument("--requests", type=int, default=300, help="in each of three runs: ours, ours again, stock")
    options = parser.parse_args()
    drawn = zipf(options.adapters, options.requests)
    with tempfile.TemporaryDirectory() as made:
        folder, base = Path(made), find_base(str(options.base))
        (folder / "adapters").mkdir()
        paths = [
            write_adapter(folder / "adapters" / f"a{n}", base, seed=n, rank=RANK, base_name=str(options.base))
            for n in range(options.adapters)
        ]
        with serve(folder / "ours", options.base, registry=publish(folder, base, paths)) as server:
            room = server.http.get("/adapterhub/state").json()["max_cpu_loras"]
            names = [f"many/a{n}" for n in range(options.adapters)]
            ours = run(server.url, names, drawn)
            touch(server.url, names)
            warm = resident_bytes(server.processes())
            again = run(server.url, names, drawn)
            end = resident_bytes(server.processes())
        with stock(
            folder,
            options.base,
            resolver=folder / "adapters",
            our_product=True,
            vllm_args=("--max-cpu-loras", str(room)),
        ) as http:
            peer = run(str(http.base_url), [path.name for path in paths], drawn)
    errors, peer_errors = failed([*ours, *again]), failed(peer)
    p99, peer_p99 = (quantile([s.first for s in streams if s.tokens], 0.99) for streams in (ours, peer))
    growth = end / warm
    print(
        f"memory {warm / 2**20:.0f} → {end / 2**20:.0f} MiB; errors: ours {errors}, stock {peer_errors}",
        file=sys.stderr,
    )
    rows = [
        row("p99 time to the first token", p99, peer_p99, "s", "<= stock", p99 <= peer_p99),
        row("errors", errors, peer_errors, f"of {2 * options.requests}", "0", errors == 0),
        row("memory at the end, over that after warm-up", growth, 1.0, "x", f"<= {FLAT}", growth <= FLAT),
    ]
    print(json.dumps({"rows": rows}))
    return 0


def publish(folder: Path, base: object, paths: Sequence[Path]) -> str:
    """All of them before the server starts, so that it makes room for them. Returns the registry's URL."""
    from adapterhub.registry import open_registry

    registry = open_registry((folder / "registry").as_uri())
    for path in paths:
        registry.publish(draft(path, base=base), name=AdapterName("many", path.name), author="bench")
    return registry.url


def zipf(count: int, requests: int) -> list[int]:
    """Which adapter each request asks for."""
    weights = [1 / (rank + 1) ** EXPONENT for rank in range(count)]
    return random.Random(0).choices(range(count), weights, k=requests)


def run(url: str, names: Sequence[str], drawn: Sequence[int]) -> list[Stream]:
    def model(number: int) -> str:
        return names[drawn[number]]

    sizes = {"words": WORDS, "tokens": TOKENS}
    return asyncio.run(crowd(url, clients=CLIENTS, requests=len(drawn), model=model, **sizes))[0]


def touch(url: str, names: Sequence[str]) -> None:
    """Each once: what can be loaded is loaded."""

    async def each() -> None:
        async with many(url) as http:
            for name in names:
                await ask(http, name, words=2, tokens=1, seed=name)

    asyncio.run(each())


def failed(streams: Sequence[Stream]) -> int:
    return sum(s.status != 200 or not s.tokens for s in streams)


def row(what: str, ours: float, peer: float, unit: str, bar: str, met: bool) -> dict[str, object]:
    ratio = round(ours / peer, 2) if peer else None
    shown = {"ours": round(ours, 3), "peer": round(peer, 3), "ratio": ratio, "unit": unit, "bar": bar, "met": met}
    return {"name": f"many adapters: {what}", **shown, "machine": machine()}


if __name__ == "__main__":
    os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")  # GiB
    sys.exit(main())
