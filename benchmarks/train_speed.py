"""`ah train` beside the plain TRL script: tokens a second and peak memory; and packed beside that script.

speed    the configuration that most people begin with: rank 16 on q_proj and v_proj, micro batch 2, accumulation
         8, bf16. Each side a process of its own, alternated; tokens without padding over the same optimizer steps
         after warm-up; medians
packing  `sample_packing` beside the plain script, which fills rows up: micro batch 8, rows of lognormal lengths
         (σ = 1), and about as many rows an optimizer step on either side, so that the evaluation losses of the
         adapters at the end can be compared
"""

from __future__ import annotations

import argparse
import json
import math
import os
import random
import statistics
import tempfile
from dataclasses import replace
from itertools import cycle
from pathlib import Path
from typing import Any

from machine import machine
from trainings import OURS, TRL, Trained, Training, chat, example_rows, run, small_base, write_rows

SPEED, MEMORY, PACKED_SPEED, PACKED_LOSS = 0.97, 1.03, 1.4, 0.02
MIDDLE, LONGEST = 48, 256  # tokens of a row: the median of the lognormal lengths, and where they are cut
PACKED_AGAINST = 2  # rows of about 115 tokens that fit one of 256: unpacked steps take so many micro batches


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=5, help="optimizer steps of the speed runs, the first is warm-up")
    parser.add_argument("--packed-rows", type=int, default=480, help="rows of the packing runs; one epoch")
    parser.add_argument("--only", choices=("speed", "packing"))
    arguments = parser.parse_args()
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")
    base = small_base()
    found: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as scratch:
        if arguments.only != "packing":
            found += speed(base, Path(scratch), rounds=arguments.rounds, steps=arguments.steps)
        if arguments.only != "speed":
            found += packing(base, Path(scratch), count=arguments.packed_rows)
    print(json.dumps({"rows": [row | {"machine": machine()} for row in found]}))


def speed(base: str, folder: Path, *, rounds: int, steps: int) -> list[dict[str, Any]]:
    training = Training(
        base=base,
        data=write_rows(folder / "rows.jsonl", example_rows()),
        targets=("q_proj", "v_proj"),
        dropout=0.05,
        sequence_len=2048,
        accumulation=8,
        max_steps=steps,
    )
    done: dict[str, list[Trained]] = {OURS: [], TRL: []}
    for i in range(rounds):
        for side in (OURS, TRL) if i % 2 == 0 else (TRL, OURS):
            trained = run(side, training, folder / f"{side}-{i}")
            done[side].append(trained)
            print(f"{side}: {trained.speed(warmup=1):.1f} tokens/s, {trained.peak / 2**20:.0f} MiB", flush=True)
    speeds = {side: statistics.median(t.speed(warmup=1) for t in runs) for side, runs in done.items()}
    peaks = {side: statistics.median(t.peak for t in runs) / 2**20 for side, runs in done.items()}
    faster, larger = speeds[OURS] / speeds[TRL], peaks[OURS] / peaks[TRL]
    return [
        row("training beside plain TRL: speed", speeds, faster, "tokens/s", f"≥ {SPEED}", faster >= SPEED),
        row("training beside plain TRL: peak memory", peaks, larger, "MiB", f"≤ {MEMORY}", larger <= MEMORY),
    ]


def packing(base: str, folder: Path, *, count: int) -> list[dict[str, Any]]:
    rows = lognormal_rows(count + 40, seed=1)
    held_out = write_rows(folder / "held-out.jsonl", rows[count:])
    plain = Training(
        base=base,
        data=write_rows(folder / "lengths.jsonl", rows[:count]),
        sequence_len=LONGEST,
        micro_batch=8,
        accumulation=PACKED_AGAINST,
        rate=5e-4,
    )
    sides = {OURS: replace(plain, packing=True, accumulation=1), TRL: plain}
    done = {}
    for side, training in sides.items():
        done[side] = t = run(side, training, folder / f"packed-{side}")
        print(f"{side}: {t.speed(warmup=1):.1f} tokens/s, {len(t.steps)} steps, {t.peak / 2**20:.0f} MiB", flush=True)
    losses = evaluated(base, held_out, {side: t.adapter for side, t in done.items()})
    speeds = {side: t.speed(warmup=1) for side, t in done.items()}
    faster, worse = speeds[OURS] / speeds[TRL], losses[OURS] / losses[TRL]
    bar = f"within {PACKED_LOSS:.0%}"
    return [
        row("packed beside plain TRL: speed", speeds, faster, "tokens/s", f"≥ {PACKED_SPEED}", faster >= PACKED_SPEED),
        row("packed beside plain TRL: loss", losses, worse, "nats a token", bar, abs(worse - 1) <= PACKED_LOSS),
    ]


def evaluated(base: str, data: Path, adapters: dict[str, Path]) -> dict[str, float]:
    """Each adapter's loss on the same rows with the same labels."""
    from adapterhub.trainers.evaluation.evaluate import Subject, evaluate, prepare_evaluation

    prepared = prepare_evaluation(base, [data], adapter=None)
    found = evaluate(prepared, [Subject(side, path) for side, path in adapters.items()])
    return {side: metrics["eval_loss"] for side, metrics in found.items()}


def lognormal_rows(count: int, *, seed: int) -> list[dict[str, Any]]:
    """Conversations whose answers are the examples' sentences, as many as a lognormal length (σ = 1) takes."""
    lengths = random.Random(seed)
    examples = cycle(example_rows())
    rows = []
    for _ in range(count):
        tokens = min(lengths.lognormvariate(math.log(MIDDLE), 1), 0.8 * LONGEST)
        question, answer = (message["content"] for message in next(examples)["messages"][-2:])
        while len(answer) < 4 * tokens:  # about four characters a token
            answer += " " + next(examples)["messages"][-1]["content"]
        rows.append(chat(question, answer[: max(int(4 * tokens), 20)]))
    return rows


def row(name: str, sides: dict[str, float], ratio: float, unit: str, bar: str, met: bool) -> dict[str, Any]:
    ours, peer = (round(sides[side], 4) for side in (OURS, TRL))
    return {"name": name, "ours": ours, "peer": peer, "ratio": round(ratio, 3), "unit": unit, "bar": bar, "met": met}


if __name__ == "__main__":
    main()
