"""Tokens per second on CPU with LoRA: 8 clients, adapters of rank 8 on all linear layers.

    decode     answers of 64 tokens, none, one and four adapters in the batch
    prefill    prompts of 800 tokens, answers of one
    room       one adapter, in an engine with 16 slots of rank 64 beside one with a single slot

Ours is `ah serve`, all of it; the peer is the same vLLM with its own LoRA product. Both are shown as a share of vLLM
with LoRA off, which may compile the model: with LoRA on, vLLM does not on CPU.

    python benchmarks/cpu_lora.py [--base DIR] [--dtype float32] [--sides off,stock,ours,room] [--turns 1]

Fewer sides give the rows that can be told from them. With several turns each side is started as often, in turn, and
its better figures count.
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
    parser.add_argument("--sides", default=",".join(SIDES), help="which of %(default)s")
    parser.add_argument("--turns", type=int, default=1)
    options = parser.parse_args()
    sides = options.sides.split(",")
    if unknown := set(sides) - set(SIDES):
        parser.error(f"no such side: {', '.join(sorted(unknown))}")
    best: dict[str, dict[str, float]] = {}
    with tempfile.TemporaryDirectory() as name:
        folder, base = Path(name), find_base(str(options.base))
        paths = [write_adapter(folder / name.tenant, base, seed=n) for n, name in enumerate(NAMES)]
        for _ in range(options.turns):
            for side in sides:
                speeds = SIDES[side](folder, base, paths, options.dtype)
                print(f"{side}: {speeds}", file=sys.stderr)
                known = best.setdefault(side, speeds)
                best[side] = {what: max(known[what], speed) for what, speed in speeds.items()}
    print(json.dumps({"rows": list(rows(best, dtype=options.dtype))}))
    return 0


Speeds = dict[str, float]  # tokens/s of each thing measured


def with_lora_off(folder: Path, base: BaseModel, paths: Sequence[Path], dtype: str) -> Speeds:
    with stock(folder, base.path, dtype=dtype, adapters={}) as http:
        return {"decode": decode(http, ["base"])}


def with_stock(folder: Path, base: BaseModel, paths: Sequence[Path], dtype: str) -> Speeds:
    adapters = {name.tenant: path for name, path in zip(NAMES, paths, strict=True)}
    with stock(folder, base.path, dtype=dtype, adapters=adapters) as http:
        return measured(http, list(adapters))


def with_ours(folder: Path, base: BaseModel, paths: Sequence[Path], dtype: str) -> Speeds:
    with ours(folder, base, paths, dtype=dtype) as http:
        return measured(http, [str(name) for name in NAMES])


def with_room(folder: Path, base: BaseModel, paths: Sequence[Path], dtype: str) -> Speeds:
    speeds = {}
    for what, slots, rank in (("narrow", 1, None), ("wide", 16, 64)):
        with ours(folder, base, paths[:1], dtype=dtype, max_loras=slots, max_lora_rank=rank) as http:
            speeds[what] = decode(http, [str(NAMES[0])])
    return speeds


SIDES: dict[str, Callable[[Path, BaseModel, Sequence[Path], str], Speeds]] = {
    "off": with_lora_off,
    "stock": with_stock,
    "ours": with_ours,
    "room": with_room,
}


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


def rows(best: dict[str, Speeds], *, dtype: str) -> Iterator[dict[str, object]]:
    """``best`` by side. What was not measured is left out."""
    title = f"LoRA on CPU, {dtype}, {CLIENTS} clients"
    own, peer = best.get("ours", {}), best.get("stock", {})
    if "off" in best:
        off = best["off"]["decode"]
        for what, used in USED.items():
            share = OF_OFF if used else BASE_OF_OFF
            if value := own.get(what):
                yield row(f"{title}, {what}, of LoRA off", value, off, f">= {share}", share)
    for what in ("one adapter", "four adapters"):
        if (value := own.get(what)) and (beside := peer.get(what)):
            yield row(f"{title}, {what}, of stock", value, beside, f">= {OF_STOCK}", OF_STOCK)
    if (value := own.get("prefill")) and (beside := peer.get("prefill")):
        bar = f">= {PREFILL_OF_STOCK} of stock"
        yield row(f"{title}, prompts of {PROMPT} tokens", value, beside, bar, PREFILL_OF_STOCK)
    if "room" in best:
        narrow, wide = best["room"]["narrow"], best["room"]["wide"]
        yield row(f"{title}, 16 slots of rank 64 against one slot", wide, narrow, f">= {ROOM}", ROOM)


def row(name: str, value: float, beside: float, bar: str, least: float) -> dict[str, object]:
    return {
        "name": name,
        "ours": round(value, 1),
        "peer": round(beside, 1),
        "ratio": round(value / beside, 2),
        "unit": "tokens/s",
        "machine": machine(),
        "bar": bar,
        "met": value >= least * beside,
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
