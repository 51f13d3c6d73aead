"""Does the exported model say what the served adapter says? Greedy tokens, one request at a time, in vLLM.

SmolLM2 and the support bot trained on it: served as an adapter by `ah serve`, and exported and served by plain vLLM
with none of our plug-ins. Both in float32: every prompt on which the two part must be explained by two tokens whose
logits lie less than 1e-3 apart. In bfloat16, where the engine itself is not of one mind, the share is only told, over
fewer prompts and tokens: a CPU without bfloat16 instructions needs minutes for what takes seconds in float32.

    python benchmarks/export_greedy.py [--base DIR] [--adapter DIR]
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
from engines import serve, stock
from machine import machine

from adapterhub.base import find_base
from adapterhub.export import export_model
from adapterhub.refs import AdapterName
from adapterhub.registry import draft

ROOT = Path(__file__).resolve().parents[1]
BOT = ROOT / "examples" / "support-bot"
SIZES = {"float32": (50, 64), "bfloat16": (6, 24)}  # prompts, tokens
GAP = 1e-3  # between two logits: below it, rounding chooses
NAME = AdapterName.parse("harbor/support")


@dataclass(frozen=True)
class Answer:
    """Greedy tokens, and of each how far the second-best lies behind it (natural logarithm, as logits do)."""

    tokens: tuple[str, ...]
    gaps: tuple[float, ...]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--base", type=Path, default=ROOT / ".models" / "SmolLM2-135M-Instruct")
    parser.add_argument("--adapter", type=Path, help="a trained adapter; left out, the support bot is trained")
    parser.add_argument("--dtype", nargs="+", choices=SIZES, default=list(SIZES))
    options = parser.parse_args()
    rows = []
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        adapter = options.adapter or train(options.base, folder / "run")
        for dtype in options.dtype:
            served = ask_served(folder / f"served-{dtype}", options.base, adapter, dtype)
            exported = ask_exported(folder / f"exported-{dtype}", options.base, adapter, dtype)
            rows += compare(dtype, served, exported)
            print(json.dumps(rows[-1], ensure_ascii=False), file=sys.stderr)
    print(json.dumps({"rows": rows}, ensure_ascii=False))


def train(base: Path, run: Path) -> Path:
    command = [sys.executable, "-m", "adapterhub.cli.main", "train", BOT / "config.yml", "--base", base, "--out", run]
    subprocess.run(command, check=True, stdout=sys.stderr)
    return run / "adapter"


def ask_served(folder: Path, base: Path, adapter: Path, dtype: str) -> list[Answer]:
    with serve(folder, base, dtype=dtype) as server:
        server.registry.publish(draft(adapter, base=find_base(str(base))), name=NAME, author="bench")
        return ask_all(server.http, str(NAME), dtype)


def ask_exported(folder: Path, base: Path, adapter: Path, dtype: str) -> list[Answer]:
    export_model(adapter, find_base(str(base)), folder / "model", dtype=dtype)
    with stock(folder, folder / "model", dtype=dtype, adapters={}) as http:
        return ask_all(http, "base", dtype)


def ask_all(http: httpx.Client, model: str, dtype: str) -> list[Answer]:
    count, tokens = SIZES[dtype]
    return [ask(http, model, prompt, tokens) for prompt in prompts()[:count]]


def prompts() -> list[str]:
    """What customers ask: held-out questions first, then those of the other sets."""
    files = [BOT / "eval.jsonl", BOT / "eval-v2.jsonl", BOT.parent / "function-calling" / "eval.jsonl"]
    files += [BOT / "train-v2.jsonl", BOT / "train.jsonl"]
    rows = [json.loads(line) for file in files for line in file.read_text(encoding="utf-8").splitlines() if line]
    asked = (message["content"] for row in rows for message in row["messages"] if message["role"] == "user")
    return list(dict.fromkeys(asked))


def ask(http: httpx.Client, model: str, prompt: str, tokens: int) -> Answer:
    body = {
        "model": model,
        "messages": [{"role": "user", "content": prompt}],
        "max_tokens": tokens,
        "temperature": 0,
        "logprobs": True,
        "top_logprobs": 2,
        "ignore_eos": True,  # all of them are compared, not only those up to the end of the answer
    }
    response = http.post("/v1/chat/completions", json=body)
    response.raise_for_status()
    found: list[dict[str, Any]] = response.json()["choices"][0]["logprobs"]["content"]
    return Answer(tuple(step["token"] for step in found), tuple(map(gap, found)))


def gap(step: dict[str, Any]) -> float:
    best, second = sorted((top["logprob"] for top in step["top_logprobs"]), reverse=True)[:2]
    return float(best - second)


def compare(dtype: str, served: list[Answer], exported: list[Answer]) -> list[dict[str, Any]]:
    pairs = list(zip(served, exported, strict=True))
    parted = [where_they_part(a, b) for a, b in pairs if a.tokens != b.tokens]
    share = 1 - len(parted) / len(pairs)
    unexplained = sum(gap >= GAP for gap in parted)
    count, tokens = SIZES[dtype]
    what = f"export: greedy tokens as the served adapter's, {dtype}, {count} prompts x {tokens}"
    numbers = {"peer": 1, "unit": "share", "machine": machine(), "gaps": parted}
    if dtype != "float32":
        return [{"name": what, "ours": share, "ratio": share, **numbers}]
    return [
        {"name": what, "ours": share, "ratio": share, **numbers, "bar": "≥ 0.95", "met": share >= 0.95},
        {
            "name": f"export: prompts that part, {dtype}, not explained by a logit gap below {GAP}",
            **numbers,
            "ours": unexplained,
            "peer": 0,
            "unit": "prompts",
            "bar": "0",
            "met": unexplained == 0,
        },
    ]


def where_they_part(a: Answer, b: Answer) -> float:
    """The smaller of the two gaps at the first token that differs."""
    first = next(i for i, (x, y) in enumerate(zip(a.tokens, b.tokens, strict=False)) if x != y)
    return min(a.gaps[first], b.gaps[first])


if __name__ == "__main__":
    main()
