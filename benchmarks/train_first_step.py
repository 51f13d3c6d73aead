"""How long `ah train` takes to its first step on 10,000 rows, beside what nobody can leave out.

    ours   from the command to the start of the first step: everything read and checked, labels made, trainer built
    peer   torch imported, the model loaded with transformers, and the same rows through the chat template and the
           tokenizer, one by one

Each side is a process of its own; alternated; medians.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import yaml
from machine import machine
from trainings import OURS, TRL, Training, chat, example_rows, small_base, write_rows

SECONDS = 3.0
PEER = """
import json, sys
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer
model = AutoModelForCausalLM.from_pretrained(sys.argv[1])
tokenizer = AutoTokenizer.from_pretrained(sys.argv[1])
for line in open(sys.argv[2]):
    tokenizer.apply_chat_template(json.loads(line)["messages"])
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=10_000)
    parser.add_argument("--rounds", type=int, default=3)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        folder, base = Path(scratch), small_base()
        data = write_rows(folder / "rows.jsonl", rows(arguments.rows))
        training = Training(base=base, data=data, micro_batch=1, max_steps=1)
        seconds: dict[str, list[float]] = {OURS: [], TRL: []}
        for i in range(arguments.rounds):
            seconds[OURS].append(to_first_step(training, folder / str(i)))
            began = time.monotonic()
            subprocess.run([sys.executable, "-c", PEER, base, data], check=True, stderr=subprocess.DEVNULL)
            seconds[TRL].append(time.monotonic() - began)
            print(f"ours {seconds[OURS][-1]:.1f} s, peer {seconds[TRL][-1]:.1f} s", flush=True)
    ours, peer = (statistics.median(seconds[side]) for side in (OURS, TRL))
    print(
        json.dumps(
            {
                "name": f"time to the first step, {arguments.rows:,} rows, beside torch, the model and the tokenizer",
                "ours": round(ours, 2),
                "peer": round(peer, 2),
                "ratio": round(ours / peer, 3),
                "unit": "s",
                "bar": f"≤ peer + {SECONDS:g} s",
                "met": ours <= peer + SECONDS,
                "machine": machine(),
            }
        )
    )


def to_first_step(training: Training, folder: Path) -> float:
    folder.mkdir()
    config, out = folder / "config.yml", folder / "run"
    config.write_text(yaml.safe_dump(training.to_config(out), sort_keys=False))
    began = time.monotonic()
    command = [sys.executable, "-m", "adapterhub.cli.main", "train", str(config)]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    assert process.stderr is not None
    done = None
    for line in process.stderr:
        if line.startswith("step 1/1"):
            done = time.monotonic() - began
    if process.wait() or done is None:
        sys.exit(f"error: {' '.join(command)} failed")
    step = json.loads((out / "metrics.jsonl").read_text().splitlines()[0])
    return done - float(step["seconds"])


def rows(count: int) -> list[dict[str, object]]:
    """The examples' conversations over and over, each with a question of its own."""
    examples = example_rows()
    found = []
    for i in range(count):
        question, answer = (message["content"] for message in examples[i % len(examples)]["messages"][-2:])
        found.append(chat(f"{question} (case {i})", answer))
    return found


if __name__ == "__main__":
    main()
