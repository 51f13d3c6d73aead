"""Hot swap under load: 8 clients in a loop while a channel moves five times between two versions.

Ours is the time to first token of the first request on a version that was never used before, right after its channel
moved to it (it was loaded before the name flipped). The peer is a warm request in the same run. Failed requests, and
answers that are not byte for byte the greedy answer of the version that they name, must be none.

    python benchmarks/hot_swap.py [--base DIR]
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
import threading
import time
from collections import Counter
from pathlib import Path
from statistics import median

import httpx
from engines import published, serve, time_to_first_token
from machine import machine

from adapterhub.refs import AdapterName

NAME = AdapterName.parse("acme/support")
CLIENTS, MOVES, BAR = 8, 5, 1.5
PROMPTS = ["What is the capital of France?", "Name three colours.", "Write one line about rain.", "Count to five."]
PROBES = 5


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--base", type=Path, default=Path(__file__).parents[1] / ".models" / "SmolLM2-135M-Instruct")
    base = parser.parse_args().base
    with tempfile.TemporaryDirectory() as folder, serve(Path(folder), base) as server:
        for seed in (1, 2):
            published(server, NAME, seed=seed)
        server.registry.set_channel(NAME, "prod", {1: 100}, who="bench")
        swap = under_load(server)
        first, warm = first_on_new_versions(server)
    ratio = first / warm
    row = {
        "name": "hot swap: first token on the new version, against a warm request",
        "ours": round(first, 4),
        "peer": round(warm, 4),
        "ratio": round(ratio, 2),
        "unit": "s",
        "machine": machine(),
        "bar": f"0 failed, 0 wrong, ratio <= {BAR}",
        "met": swap["failed"] == swap["wrong"] == 0 and ratio <= BAR,
        **swap,
    }
    print(json.dumps(row))
    return 0


def under_load(server) -> dict[str, int]:
    """Requests, failures and wrong answers of the clients' loop."""
    models = [f"{NAME}@{version}" for version in (1, 2)]
    alone = {(model, prompt): answer(server.http, model, prompt)[1] for model in models for prompt in PROMPTS}
    assert len({alone[model, PROMPTS[0]] for model in models}) == 2, "the versions must answer differently"
    results: list[tuple[str, str, str]] = []
    stop = threading.Event()

    def client(number: int) -> None:
        with httpx.Client(base_url=server.url, timeout=120) as http:
            turn = number
            while not stop.is_set():
                prompt = PROMPTS[turn % len(PROMPTS)]
                results.append((prompt, *answer(http, f"{NAME}@prod", prompt)))
                turn += 1

    threads = [threading.Thread(target=client, args=(n,)) for n in range(CLIENTS)]
    for thread in threads:
        thread.start()
    for move in range(MOVES):
        seen = len(results)
        server.registry.set_channel(NAME, "prod", {2 - move % 2: 100}, who="bench")
        target = f"{NAME}@{2 - move % 2}"
        while sum(version == target for _, version, _ in results[seen:]) < 2 * CLIENTS:
            time.sleep(0.05)
    stop.set()
    for thread in threads:
        thread.join()
    failed = sum(version == "" for _, version, _ in results)
    wrong = sum(version != "" and alone[version, prompt] != text for prompt, version, text in results)
    counts = Counter(version for _, version, _ in results)
    print(f"answers by version: {dict(counts)}", file=sys.stderr)
    return {"requests": len(results), "failed": failed, "wrong": wrong, "moves": MOVES}


def answer(http: httpx.Client, model: str, prompt: str) -> tuple[str, str]:
    """(version, text); the version is empty where the request failed."""
    body = {"model": model, "messages": [{"role": "user", "content": prompt}], "max_tokens": 24, "temperature": 0}
    try:
        got = http.post("/v1/chat/completions", json=body)
        choice = got.raise_for_status().json()
    except httpx.HTTPError as error:
        return "", repr(error)
    return got.headers["x-adapterhub-version"], choice["choices"][0]["message"]["content"]


def first_on_new_versions(server) -> tuple[float, float]:
    """Medians in seconds: the first request on each of some new versions, and warm requests just before each."""
    first, warm = [], []
    for n in range(PROBES):
        warm += [time_to_first_token(server, f"{NAME}@prod", seed=10 * n + k) for k in range(4)]
        record = published(server, NAME, seed=100 + n)
        server.registry.set_channel(NAME, "prod", {record.version: 100}, who="bench")
        server.http.post("/adapterhub/poll").raise_for_status()
        first.append(time_to_first_token(server, f"{NAME}@prod", seed=10 * n + 9, expect=str(record.ref)))
    print(f"first {[round(t, 3) for t in first]}, warm {[round(t, 3) for t in warm]}", file=sys.stderr)
    return median(first), median(warm)


if __name__ == "__main__":
    os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")  # GiB
    sys.exit(main())
