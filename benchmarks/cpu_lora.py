"""Tokens per second on CPU with LoRA: 8 clients, answers of 64 tokens, none, one and four adapters of rank 8.

Ours is `ah serve`, all of it; the peer is the same vLLM with its own LoRA product. Both are shown as a share of vLLM
with LoRA off, which may compile the model: with LoRA on, vLLM does not on CPU.

    python benchmarks/cpu_lora.py [--base DIR] [--dtype float32]
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx
from engines import serve, stock, write_adapter
from machine import machine

from adapterhub.base import find_base
from adapterhub.refs import AdapterName
from adapterhub.registry import draft

NAMES = [AdapterName.parse(f"{tenant}/bot") for tenant in ("acme", "globex", "initech", "umbrella")]
CLIENTS, REQUESTS, TOKENS, ROUNDS = 8, 16, 64, 2
OF_STOCK, OF_OFF = 1.8, 0.7  # bars


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--base", type=Path, default=Path(__file__).parents[1] / ".models" / "SmolLM2-135M-Instruct")
    parser.add_argument("--dtype", default="float32")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        base = find_base(str(options.base))
        paths = [write_adapter(Path(folder) / name.tenant, base, seed=n) for n, name in enumerate(NAMES)]
        with stock(Path(folder), options.base, dtype=options.dtype, adapters={}) as http:
            off = tokens_per_second(http, ["base"])
            print(f"LoRA off: {off:.0f}", file=sys.stderr)
        adapters = {name.tenant: path for name, path in zip(NAMES, paths, strict=True)}
        with stock(Path(folder), options.base, dtype=options.dtype, adapters=adapters) as http:
            peer = measured(http, list(adapters))
            print(f"stock: {peer}", file=sys.stderr)
        with serve(Path(folder), options.base, dtype=options.dtype) as server:
            for name, path in zip(NAMES, paths, strict=True):
                server.registry.publish(draft(path, base=base), name=name, author="bench")
            ours = measured(server.http, [str(name) for name in NAMES])
            print(f"ours: {ours}", file=sys.stderr)
    rows = [row(what, ours[what], peer[what], off, dtype=options.dtype) for what in ours]
    print(json.dumps({"rows": rows}))
    return 0


def row(what: str, ours: float, peer: float, off: float, *, dtype: str) -> dict[str, object]:
    adapters_used = what != "no adapter"
    return {
        "name": f"LoRA on CPU, {dtype}, {CLIENTS} clients, {what}",
        "ours": round(ours, 1),
        "peer": round(peer, 1),
        "ratio": round(ours / peer, 2),
        "unit": "tokens/s",
        "machine": machine(),
        "bar": f">= {OF_STOCK} of stock, >= {OF_OFF} of LoRA off" if adapters_used else None,
        "met": ours >= OF_STOCK * peer and ours >= OF_OFF * off if adapters_used else None,
        "off": round(off, 1),
        "of_off": round(ours / off, 2),
    }


def measured(http: httpx.Client, adapters: Sequence[str]) -> dict[str, float]:
    used = {"no adapter": ["base"], "one adapter": adapters[:1], "four adapters": adapters}
    return {what: tokens_per_second(http, models) for what, models in used.items()}


def tokens_per_second(http: httpx.Client, models: Sequence[str]) -> float:
    """The better of some rounds, after every model has answered once."""

    def ask(number: int) -> int:
        body = {"model": models[number % len(models)], "prompt": f"The number {number} is", "max_tokens": TOKENS}
        answer = http.post("/v1/completions", json=body | {"temperature": 0, "ignore_eos": True})
        tokens: int = answer.raise_for_status().json()["usage"]["completion_tokens"]
        return tokens

    best = 0.0
    with ThreadPoolExecutor(CLIENTS) as clients:
        list(clients.map(ask, range(len(models))))
        for _ in range(ROUNDS):
            start = time.perf_counter()
            tokens = sum(clients.map(ask, range(REQUESTS)))
            best = max(best, tokens / (time.perf_counter() - start))
    return best


if __name__ == "__main__":
    os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")  # GiB
    sys.exit(main())
