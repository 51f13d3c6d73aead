"""Does an answer depend on who else is in the batch? 200 concurrent requests over the base and 4 adapters on 4 slots.

Every question is asked alone first, then all at once; greedy. A share of 1 means that each answer is byte for byte
the one given alone. The peer is the same vLLM, same flags, with its own LoRA product on CPU. In bfloat16
even an engine without adapters answers differently batched and alone, so that share has no bar.

    python benchmarks/batching_truth.py [--base DIR] [--dtype float32 …]
"""

from __future__ import annotations

import argparse
import json
import os
import random
import sys
import tempfile
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
STARTS = ["The capital of France is", "Once upon a time", "To bake bread you need", "My favourite colour is", "In 1969"]
ENDS = ["", " not", " always", " said to be", " never", " perhaps", " still", " only"]
TOKENS = 16
# A CPU without bfloat16 instructions needs minutes for what takes seconds in float32
REQUESTS = {"float32": 200, "bfloat16": 40}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--base", type=Path, default=Path(__file__).parents[1] / ".models" / "SmolLM2-135M-Instruct")
    parser.add_argument("--dtype", nargs="+", choices=REQUESTS, default=list(REQUESTS))
    options = parser.parse_args()
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        base = find_base(str(options.base))
        paths = [write_adapter(Path(folder) / name.tenant, base, seed=n) for n, name in enumerate(NAMES)]
        for dtype in options.dtype:
            with serve(Path(folder) / dtype, options.base, dtype=dtype) as server:
                for name, path in zip(NAMES, paths, strict=True):
                    server.registry.publish(draft(path, base=base), name=name, author="bench")
                ours = same_alone_and_together(server.http, [str(name) for name in NAMES], REQUESTS[dtype])
            adapters = {name.tenant: path for name, path in zip(NAMES, paths, strict=True)}
            with stock(Path(folder), options.base, dtype=dtype, adapters=adapters) as http:
                peer = same_alone_and_together(http, list(adapters), REQUESTS[dtype])
            rows.append(row(dtype, ours, peer))
            print(json.dumps(rows[-1]), file=sys.stderr)
    print(json.dumps({"rows": rows}))
    return 0


def row(dtype: str, ours: dict[str, float], peer: dict[str, float]) -> dict[str, object]:
    has_bar = dtype == "float32"
    return {
        "name": f"truth under batching, {dtype}, {REQUESTS[dtype]} requests: answers as when alone",
        "ours": ours["all"],
        "peer": peer["all"],
        "ratio": round(ours["all"] / peer["all"], 2) if peer["all"] else None,
        "unit": "share",
        "machine": machine(),
        "bar": "1" if has_bar else None,
        "met": ours["all"] == 1 if has_bar else None,
        "base_ours": ours["base"],
        "base_peer": peer["base"],
    }


def same_alone_and_together(http: httpx.Client, adapters: Sequence[str], requests: int) -> dict[str, float]:
    """The share of answers that are the same: of ``all``, and of those that the ``base`` gave."""
    models = ["base", *adapters]
    prompts = [start + end for end in ENDS for start in STARTS]
    asked = [(models[i % len(models)], prompts[i // len(models) % len(prompts)]) for i in range(requests)]
    random.Random(0).shuffle(asked)
    for model in models:  # every slot is taken before anything is compared
        answer(http, model, "Hello")
    alone = [answer(http, model, prompt) for model, prompt in asked]
    with ThreadPoolExecutor(len(asked)) as clients:
        together = list(clients.map(lambda request: answer(http, *request), asked))
    same = [one == other for one, other in zip(alone, together, strict=True)]
    of_base = [s for s, (model, _) in zip(same, asked, strict=True) if model == "base"]
    return {"all": sum(same) / len(same), "base": sum(of_base) / len(of_base)}


def answer(http: httpx.Client, model: str, prompt: str) -> str:
    body = {"model": model, "prompt": prompt, "max_tokens": TOKENS, "temperature": 0, "ignore_eos": True}
    text: str = http.post("/v1/completions", json=body).raise_for_status().json()["choices"][0]["text"]
    return text


if __name__ == "__main__":
    os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")  # GiB
    sys.exit(main())
