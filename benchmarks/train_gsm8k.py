"""GSM8K, one epoch of LoRA on all linear layers of SmolLM2: `ah train` beside the plain TRL script.

Both adapters, and the base, are measured on the same test rows with the same labels: the loss over the answers and
their ends. Then ours answers them, greedily: how many answers end by themselves?
"""

from __future__ import annotations

import argparse
import json
import os
import tempfile
from pathlib import Path
from typing import Any

from machine import machine
from trainings import OURS, TRL, Training, gsm8k, run, small_base, write_rows

WITHIN = 0.01


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rows", type=int, default=1000)
    parser.add_argument("--test-rows", type=int, default=200)
    parser.add_argument("--answers", type=int, default=200, help="of the test rows")
    parser.add_argument("--max-tokens", type=int, default=400, help="of an answer")
    parser.add_argument("--max-steps", type=int, help="of 8 rows; default: one epoch")
    parser.add_argument("--keep", type=Path, help="train in this folder, and leave it")
    arguments = parser.parse_args()
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")
    train, test = gsm8k("train", arguments.rows), gsm8k("test", arguments.test_rows)
    if train is None or test is None:
        print("skipped: AH_BENCH_DATA names no folder with gsm8k/train.jsonl and test.jsonl")
        print(json.dumps({"rows": []}))
        return
    with tempfile.TemporaryDirectory() as scratch:
        folder = arguments.keep or Path(scratch) / "trainings"
        folder.mkdir(parents=True)
        training = Training(
            base=small_base(),
            data=write_rows(folder / "train.jsonl", train),
            micro_batch=2,
            accumulation=4,
            rate=1e-3,
            warmup=6,
            max_steps=arguments.max_steps,
        )
        adapters = {}
        for side in (OURS, TRL):
            trained = run(side, training, folder / side)
            adapters[side] = trained.adapter
            said = f"{len(trained.steps)} steps in {trained.seconds:.0f} s, last loss {trained.losses[-1]:.3f}"
            print(f"{side}: {said}", flush=True)
        scores = scored(training.base, write_rows(folder / "test.jsonl", test), adapters, arguments)
    print(json.dumps({"rows": rows(scores, steps=len(trained.steps), answers=arguments.answers)}))


def scored(base: str, data: Path, adapters: dict[str, Path], arguments: Any) -> dict[str, dict[str, float]]:
    """``eval_loss`` of the base and both adapters, and ``ended`` of ours."""
    from adapterhub.trainers.evaluation.evaluate import Subject, evaluate, prepare_evaluation

    prepared = prepare_evaluation(base, [data], adapter=None)
    subjects = [Subject("base"), *(Subject(side, path) for side, path in adapters.items())]
    scores = {label: dict(metrics) for label, metrics in evaluate(prepared, subjects).items()}
    asked = prepare_evaluation(base, [data], adapter=None, limit=arguments.answers)
    right = ("right", lambda answer, reference: float(answer.split("####")[-1] == reference.split("####")[-1]))
    answered = evaluate(asked, [Subject(OURS, adapters[OURS])], scorers=[right], max_new_tokens=arguments.max_tokens)
    scores[OURS] |= {name: answered[OURS][name] for name in ("ended", "right")}
    return scores


def rows(scores: dict[str, dict[str, float]], *, steps: int, answers: int) -> list[dict[str, Any]]:
    ours, trl, base = (scores[side]["eval_loss"] for side in (OURS, TRL, "base"))
    ended = scores[OURS]["ended"]
    common = {"machine": machine()}
    return [
        {
            "name": f"GSM8K, SmolLM2, {steps} steps: evaluation loss beside plain TRL (base: {base:.3f})",
            "ours": ours,
            "peer": trl,
            "ratio": round(ours / trl, 4),
            "unit": "nats a token",
            "bar": f"≤ {1 + WITHIN:g}",
            "met": ours <= trl * (1 + WITHIN),
            **common,
        },
        {
            "name": f"GSM8K: answers that end by themselves, of {answers} (right: {scores[OURS]['right']:.1%})",
            "ours": ended,
            "peer": 1.0,
            "ratio": ended,
            "unit": "share",
            "bar": "all",
            "met": ended == 1.0,
            **common,
        },
    ]


if __name__ == "__main__":
    main()
