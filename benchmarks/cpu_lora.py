"""Tokens per second on CPU with LoRA: 8 clients, adapters of rank 8 on all linear layers.

    decode     answers of 64 tokens, none, one and four adapters in the batch
    prefill    prompts of 800 tokens, answers of one
    room       one adapter, in an engine with 16 slots of rank 64 beside one with a single slot

Ours is `ah serve`, all of it; the peer is the same vLLM with its own LoRA product. Both are shown as a share of vLLM
with LoRA off, which may compile the model: with LoRA on, vLLM does not on CPU.

    python benchmarks/cpu_lora.py [--base DIR] [--dtype float32]
"""

from __future__ import annotations

import argparse
import json
import os
import random
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import httpx
from engines import WORDS, serve, stock, write_adapter
from machine import machine

from adapterhub.base import BaseModel, find_base
from adapterhub.refs import AdapterName
from adapterhub.registry import draft

NAMES = [AdapterName.parse(f"{tenant}/bot") for tenant in ("acme", "globex", "initech", "umbrella")]
CLIENTS, REQUESTS, TOKENS, ROUNDS = 8, 16, 64, 2
PROMPTS, PROMPT = 4, 800  # of the prefill, and tokens of each
OF_STOCK, OF_OFF, BASE_OF_OFF, PREFILL_OF_STOCK, ROOM = 1.8, 0.7, 0.9, 5.0, 0.9  # bars
USED = {"no adapter": 0, "one adapter": 1, "four adapters": 4}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--base", type=Path, default=Path(__file__).parents[1] / ".models" / "SmolLM2-135M-Instruct")
    parser.add_argument("--dtype", default="float32")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder, base = Path(name), find_base(str(options.base))
        paths = [write_adapter(folder / name.tenant, base, seed=n) for n, name in enumerate(NAMES)]
        with stock(folder, options.base, dtype=options.dtype, adapters={}) as http:
            off = decode(http, ["base"])
            print(f"LoRA off: {off:.0f}", file=sys.stderr)
        adapters = {name.tenant: path for name, path in zip(NAMES, paths, strict=True)}
        with stock(folder, options.base, dtype=options.dtype, adapters=adapters) as http:
            peer = measured(http, list(adapters))
            print(f"stock: {peer}", file=sys.stderr)
        with ours(folder, base, paths, dtype=options.dtype) as http:
            own = measured(http, [str(name) for name in NAMES])
            print(f"ours: {own}", file=sys.stderr)
        room = []
        for slots, rank in ((1, None), (16, 64)):
            with ours(folder, base, paths[:1], dtype=options.dtype, max_loras=slots, max_lora_rank=rank) as http:
                room.append(decode(http, [str(NAMES[0])]))
        print(f"room: {room}", file=sys.stderr)
    print(json.dumps({"rows": list(rows(own, peer, off, room, dtype=options.dtype))}))
    return 0


@contextmanager
def ours(
    folder: Path,
    base: BaseModel,
    paths: Sequence[Path],
    *,
    dtype: str,
    max_loras: int = 4,
    max_lora_rank: int | None = None,
) -> Iterator[httpx.Client]:
    """`ah serve` with these adapters published under ``NAMES``."""
    with tempfile.TemporaryDirectory(dir=folder) as own:
        lora = {"max_loras": max_loras, "max_lora_rank": max_lora_rank}
        with serve(Path(own), base.path, dtype=dtype, **lora) as server:  # type: ignore[arg-type]
            for name, path in zip(NAMES, paths, strict=False):
                server.registry.publish(draft(path, base=base), name=name, author="bench")
            yield server.http


def rows(
    own: dict[str, float], peer: dict[str, float], off: float, room: list[float], *, dtype: str
) -> Iterator[dict[str, object]]:
    title = f"LoRA on CPU, {dtype}, {CLIENTS} clients"
    for what, used in USED.items():
        value, beside = own[what], peer[what]
        bar = f">= {OF_STOCK} of stock, >= {OF_OFF} of LoRA off" if used else f">= {BASE_OF_OFF} of LoRA off"
        met = value >= OF_STOCK * beside and value >= OF_OFF * off if used else value >= BASE_OF_OFF * off
        shares = {"off": round(off, 1), "of_off": round(value / off, 2)}
        yield row(f"{title}, {what}", value, beside, bar, met) | shares
    value, beside = own["prefill"], peer["prefill"]
    bar = f">= {PREFILL_OF_STOCK} of stock"
    yield row(f"{title}, prompts of {PROMPT} tokens", value, beside, bar, value >= PREFILL_OF_STOCK * beside)
    narrow, wide = room
    met = wide >= ROOM * narrow
    yield row(f"{title}, 16 slots of rank 64 against one slot", wide, narrow, f">= {ROOM} of one slot", met)


def row(name: str, value: float, beside: float, bar: str, met: bool) -> dict[str, object]:
    return {
        "name": name,
        "ours": round(value, 1),
        "peer": round(beside, 1),
        "ratio": round(value / beside, 2),
        "unit": "tokens/s",
        "machine": machine(),
        "bar": bar,
        "met": met,
    }


def measured(http: httpx.Client, adapters: Sequence[str]) -> dict[str, float]:
    speeds = {what: decode(http, adapters[:used] or ["base"]) for what, used in USED.items()}
    return speeds | {"prefill": prefill(http, adapters[0])}


def decode(http: httpx.Client, models: Sequence[str]) -> float:
    """Generated tokens per second: the better of some rounds, after every model has answered once."""

    def ask(number: int) -> int:
        body = {"prompt": f"The number {number} is", "max_tokens": TOKENS, "ignore_eos": True}
        return completion(http, models[number % len(models)], body)["completion_tokens"]

    with ThreadPoolExecutor(CLIENTS) as clients:
        list(clients.map(ask, range(len(models))))
        return max(per_second(clients, ask, REQUESTS) for _ in range(ROUNDS))


def prefill(http: httpx.Client, model: str) -> float:
    """Prompt tokens per second. No prompt was ever asked before."""
    rng = random.Random(time.time_ns())

    def ask(number: int) -> int:
        return completion(http, model, {"prompt": " ".join(rng.choices(WORDS, k=PROMPT)), "max_tokens": 1})[
            "prompt_tokens"
        ]

    with ThreadPoolExecutor(CLIENTS) as clients:
        return max(per_second(clients, ask, PROMPTS) for _ in range(ROUNDS))


def per_second(clients: ThreadPoolExecutor, ask: Callable[[int], int], requests: int) -> float:
    start = time.perf_counter()
    return sum(clients.map(ask, range(requests))) / (time.perf_counter() - start)


def completion(http: httpx.Client, model: str, body: dict[str, object]) -> dict[str, int]:
    """What the answer says was used."""
    answer = http.post("/v1/completions", json=body | {"model": model, "temperature": 0})
    usage: dict[str, int] = answer.raise_for_status().json()["usage"]
    return usage


if __name__ == "__main__":
    os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")  # GiB
    sys.exit(main())
