"""DPO and KTO on the pairs of the support bot: does the trained model hold the better answer for the better one?

    ours   share of held-out pairs whose chosen answer gained more over the base than the rejected one
    peer   share of them whose chosen answer is the likelier one for the base itself, a token for a token

The reward of an answer is beta times what its log probability gained over the base (arXiv:2305.18290, equation 5),
computed here from plain forward passes. The margin must be positive, and rise while training.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from dataclasses import replace
from pathlib import Path
from statistics import mean
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
EXAMPLE = ROOT / "examples" / "support-bot"
HELD_OUT = 21  # of the training pairs, beside the ten that are always held out
BETA, BAR = 0.1, 0.9


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--methods", nargs="+", default=["dpo", "kto"])
    parser.add_argument("--epochs", type=float, default=1.0)
    arguments = parser.parse_args()
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")
    base = subprocess.run([sys.executable, ROOT / "scripts" / "demo_base.py"], check=True, stdout=subprocess.PIPE)
    with tempfile.TemporaryDirectory(prefix="ah-bench-") as folder:
        data = split(Path(folder))
        rows = [
            measured(method, Path(folder), data, base.stdout.decode().strip(), arguments.epochs)
            for method in arguments.methods
        ]
    print(json.dumps({"rows": rows}))


def split(folder: Path) -> tuple[Path, Path]:
    """The files of pairs to train on, and of those held out."""
    pairs = (EXAMPLE / "pairs.jsonl").read_text().splitlines(keepends=True)
    files = folder / "train.jsonl", folder / "held-out.jsonl"
    files[0].write_text("".join(pairs[:-HELD_OUT]))
    files[1].write_text("".join(pairs[-HELD_OUT:]) + (EXAMPLE / "pairs-eval.jsonl").read_text())
    return files


def measured(method: str, folder: Path, data: tuple[Path, Path], base: str, epochs: float) -> dict[str, Any]:
    from machine import machine

    from adapterhub.trainers import DataSource, prepare, read_config, read_yaml, train

    reading = read_config(read_yaml(EXAMPLE / "config-dpo.yml"))
    config = replace(
        reading.config,
        rl=method,
        base_model=base,
        datasets=(DataSource(str(data[0])),),
        test_datasets=(),
        micro_batch_size=4 if method == "kto" else 2,  # answers, or pairs of them
        num_epochs=epochs,
        output_dir=str(folder / method),
    )
    prepared = prepare(config)
    result = train(replace(reading, config=config), prepared)
    held = prepare(replace(config, rl="dpo", datasets=(DataSource(str(data[1])),), shuffle_merged_datasets=False))
    gained, lengths, alone = gains(held, result.adapter)
    margins = [BETA * (a - b) for a, b in zip(gained[::2], gained[1::2], strict=True)]
    per_token = [total / length for total, length in zip(alone, lengths, strict=True)]
    lines = [json.loads(line) for line in (result.folder / "metrics.jsonl").read_text().splitlines()]
    trained = [line["reward_margin"] for line in lines if "reward_margin" in line]
    quarter = max(1, len(trained) // 4)
    first, last = mean(trained[:quarter]), mean(trained[-quarter:])
    ours, peer = mean(m > 0 for m in margins), mean(a > b for a, b in zip(per_token[::2], per_token[1::2], strict=True))
    return {
        "name": f"{method}: held-out pairs with the chosen answer first, of {len(margins)}",
        "ours": round(ours, 3),
        "peer": round(peer, 3),
        "ratio": round(ours / peer, 2) if peer else None,
        "unit": "share",
        "margin_held_out": round(mean(margins), 3),
        "margin_first_quarter": round(first, 3),
        "margin_last_quarter": round(last, 3),
        "steps": result.fitted.steps,
        "seconds": round(result.fitted.seconds, 1),
        "bar": f">= {BAR}, margin positive and rising",
        "met": ours >= BAR and mean(margins) > 0 and last > max(0.0, first),
        "machine": machine(),
    }


def gains(prepared: Any, adapter: Path) -> tuple[list[float], list[int], list[float]]:
    """Of each answer: what its log probability gained over the base, its tokens, and the base's log probability."""
    from peft import PeftModel

    from adapterhub.trainers.model import load_model

    model = PeftModel.from_pretrained(load_model(prepared), str(adapter)).eval()
    found, lengths, alone = [], [], []
    for example in prepared.train.examples:
        ours = log_probability(model, example)
        with model.disable_adapter():
            base = log_probability(model, example)
        found.append(ours - base)
        lengths.append(example.trained)
        alone.append(base)
    return found, lengths, alone


def log_probability(model: Any, example: Any) -> float:
    """Sum over the answer's tokens, in nats."""
    import torch

    labels = torch.tensor(example.labels[1:])
    with torch.inference_mode():
        logits = model(input_ids=torch.tensor([example.input_ids]), use_cache=False).logits[0, :-1]
    return -float(torch.nn.functional.cross_entropy(logits.float(), labels, ignore_index=-100, reduction="sum"))


if __name__ == "__main__":
    main()
