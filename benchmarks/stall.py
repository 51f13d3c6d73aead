"""How long running answers stand still while cold adapters of 10 MB load, one a second.

Four streams run; beside them one short request a second. Quiet: each asks for an adapter that is loaded. Then: each
asks for one that nobody asked for before. What counts is the longest pause between two tokens of the four streams. The
peer is stock vLLM with its file-system resolver on the same files, the same flags and our LoRA product.

    python benchmarks/stall.py [--base DIR] [--adapters 20]
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from clients import Stream, ask, many, quantile
from engines import serve, stock, write_adapter
from machine import machine
from many_adapters import publish

from adapterhub.base import find_base

STREAMS, TOKENS, RANK = 4, 900, 8  # rank 8 on all linear layers of the base is 10 MB in float32
BAR_QUIET = 2.0


@dataclass(frozen=True)
class Pauses:
    """Between tokens of the streams, in seconds."""

    longest: float
    p99: float


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--base", type=Path, default=Path(__file__).parents[1] / ".models" / "SmolLM2-135M-Instruct")
    parser.add_argument("--adapters", type=int, default=20)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as made:
        folder, base = Path(made), find_base(str(options.base))
        (folder / "adapters").mkdir()
        paths = [
            write_adapter(folder / "adapters" / f"a{n}", base, seed=n, rank=RANK, base_name=str(options.base))
            for n in range(options.adapters + 1)
        ]
        with serve(folder / "ours", options.base, registry=publish(folder, base, paths)) as server:
            room = server.http.get("/adapterhub/state").json()["max_cpu_loras"]
            quiet, ours = measure(server.url, [f"many/{path.name}" for path in paths])
        flags = ("--max-cpu-loras", str(room))
        with stock(folder, options.base, resolver=folder / "adapters", our_product=True, vllm_args=flags) as http:
            peer_quiet, peer = measure(str(http.base_url), [path.name for path in paths])
    print(f"ours: quiet {quiet}, loading {ours}; stock: quiet {peer_quiet}, loading {peer}", file=sys.stderr)
    against = ours.longest / quiet.longest
    rows = [
        row(
            "longest pause while cold adapters load",
            ours.longest,
            peer.longest,
            "s",
            "<= stock",
            ours.longest <= peer.longest,
        ),
        row(
            "that, over the longest in quiet",
            against,
            peer.longest / peer_quiet.longest,
            "x",
            f"<= {BAR_QUIET}",
            against <= BAR_QUIET,
        ),
    ]
    print(json.dumps({"rows": rows}))
    return 0


def measure(url: str, names: Sequence[str]) -> tuple[Pauses, Pauses]:
    """In quiet, and while all but the first are loaded."""
    warm, *cold = names
    asyncio.run(beside(url, warm, [warm] * 3))  # compiled, and in the page cache
    return asyncio.run(beside(url, warm, [warm] * len(cold))), asyncio.run(beside(url, warm, cold))


async def beside(url: str, warm: str, asked: Sequence[str]) -> Pauses:
    """Pauses of the streams while one model a second is asked for."""
    streams: list[Stream] = []
    async with many(url) as http:

        async def run(number: int) -> None:
            turn = 0
            while True:
                seed = f"{asked} {number} {turn}"
                await ask(http, warm, words=8, tokens=TOKENS, seed=seed, into=streams)
                turn += 1

        running = [asyncio.create_task(run(number)) for number in range(STREAMS)]
        await asyncio.sleep(2)  # seconds: all four are past their prompts
        begun = time.perf_counter()
        requests = []
        for model in asked:
            requests.append(asyncio.create_task(ask(http, model, words=4, tokens=1, seed=model)))
            await asyncio.sleep(1)
        answers = await asyncio.gather(*requests)
        assert {answer.status for answer in answers} == {200}, "a short request failed"
        assert not any(task.done() for task in running), "a stream failed"
        for task in running:
            task.cancel()
        await asyncio.gather(*running, return_exceptions=True)
    assert {stream.status for stream in streams} == {200}, "a stream failed"
    gaps = sorted((gap, round(at - begun, 1)) for stream in streams for at, gap in stream.pauses if at >= begun)
    print(f"  the longest, and when: {[(round(gap, 3), at) for gap, at in gaps[-5:]]}", file=sys.stderr)
    return Pauses(round(gaps[-1][0], 3), round(quantile([gap for gap, _ in gaps], 0.99), 3))


def row(what: str, ours: float, peer: float, unit: str, bar: str, met: bool) -> dict[str, object]:
    shown = {"ours": round(ours, 3), "peer": round(peer, 3), "ratio": round(ours / peer, 2), "unit": unit}
    return {"name": f"stall: {what}", **shown, "bar": bar, "met": met, "machine": machine()}


if __name__ == "__main__":
    os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")  # GiB
    sys.exit(main())
