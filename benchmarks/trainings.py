"""Both sides of a training benchmark: `ah train` and the plain TRL script, each a process of its own."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import yaml

ROOT = Path(__file__).resolve().parents[1]
LINEAR = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
OURS, TRL = "ours", "trl"


@dataclass(frozen=True)
class Training:
    """What both sides train with. ``data``: JSONL of conversations of one question and one answer."""

    base: str
    data: Path
    targets: tuple[str, ...] = LINEAR
    rank: int = 16
    alpha: int = 32
    dropout: float = 0.0
    sequence_len: int = 512
    micro_batch: int = 2
    accumulation: int = 1
    epochs: float = 1.0
    max_steps: int | None = None
    rate: float = 2e-4
    warmup: int = 0
    bf16: bool = True
    packing: bool = False  # ours only
    seed: int = 42

    def to_config(self, out: Path) -> dict[str, Any]:
        """As a config of `ah train`; rows stay in their order, so that both sides see the same batches."""
        return {
            "base_model": self.base,
            "datasets": [{"path": str(self.data), "type": "chat_template"}],
            "shuffle_merged_datasets": False,
            "adapter": "lora",
            "lora_r": self.rank,
            "lora_alpha": self.alpha,
            "lora_dropout": self.dropout,
            "lora_target_modules": list(self.targets),
            "sequence_len": self.sequence_len,
            "excess_length_strategy": "truncate",
            "sample_packing": self.packing,
            "micro_batch_size": self.micro_batch,
            "gradient_accumulation_steps": self.accumulation,
            "num_epochs": self.epochs,
            "max_steps": self.max_steps,
            "learning_rate": self.rate,
            "lr_scheduler": "cosine",
            "warmup_steps": self.warmup,
            "bf16": self.bf16,
            "save_strategy": "no",
            "output_dir": str(out),
            "seed": self.seed,
        }


@dataclass(frozen=True)
class Trained:
    """One side's run. ``steps``: seconds and tokens, padding not counted, after each optimizer step."""

    adapter: Path
    steps: tuple[tuple[float, int], ...]
    losses: tuple[float, ...]
    peak: int  # bytes, resident
    seconds: float  # of the whole process

    def speed(self, *, warmup: int) -> float:
        """Tokens a second after ``warmup`` steps."""
        (start, before), (end, tokens) = self.steps[warmup - 1], self.steps[-1]
        return (tokens - before) / (end - start)


def run(side: str, training: Training, folder: Path) -> Trained:
    """Train in a process of its own, in a new ``folder``."""
    folder.mkdir(parents=True)
    out = folder / "run"
    if side == OURS:
        config = folder / "config.yml"
        config.write_text(yaml.safe_dump(training.to_config(out), sort_keys=False))
        seconds, peak = _measured([sys.executable, "-m", "adapterhub.cli.main", "train", str(config)], folder)
        lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
        steps = [(line["seconds"], line["tokens"], line["loss"]) for line in lines if "loss" in line]
        timed, losses = tuple((s, t) for s, t, _ in steps), tuple(loss for _, _, loss in steps)
        return Trained(out / "adapter", timed, losses, peak, seconds)
    settings = folder / "settings.json"
    plain = asdict(training) | {"out": str(out), "data": str(training.data), "cpu": not gpu()}
    settings.write_text(json.dumps(plain))
    seconds, peak = _measured([sys.executable, str(ROOT / "benchmarks" / "plain_trl.py"), str(settings)], folder)
    told = json.loads((out / "steps.json").read_text())
    return Trained(out, tuple((s, t) for s, t in told["steps"]), tuple(told["losses"]), peak, seconds)


def _measured(command: Sequence[str], folder: Path) -> tuple[float, int]:
    """Seconds and peak resident bytes of a process. Its talk is kept in ``folder/log``."""
    began = time.monotonic()
    with (folder / "log").open("w") as log:
        process = subprocess.Popen(command, stdout=log, stderr=log, env=os.environ | {"OMP_WAIT_POLICY": "passive"})
        _, status, usage = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        sys.exit(f"error: {' '.join(command)} failed\n" + (folder / "log").read_text()[-3000:])
    return time.monotonic() - began, usage.ru_maxrss * 1024


def small_base() -> str:
    """The folder of SmolLM2-135M-Instruct."""
    made = subprocess.run([sys.executable, ROOT / "scripts" / "demo_base.py"], check=True, stdout=subprocess.PIPE)
    return made.stdout.decode().strip()


def example_rows() -> list[dict[str, Any]]:
    """The examples' conversations of one question and one answer."""
    files = sorted((ROOT / "examples").glob("*/train*.jsonl"))
    rows = [json.loads(line) for file in files for line in file.read_text().splitlines()]
    return [row for row in rows if [m["role"] for m in row["messages"]][-2:] == ["user", "assistant"] and _once(row)]


def _once(row: dict[str, Any]) -> bool:
    return sum(m["role"] == "assistant" for m in row["messages"]) == 1


def gsm8k(split: str, count: int) -> list[dict[str, Any]] | None:
    """Problems of GSM8K as conversations; None where ``AH_BENCH_DATA`` names no folder with them."""
    file = Path(os.environ.get("AH_BENCH_DATA", "")) / "gsm8k" / f"{split}.jsonl"
    if "AH_BENCH_DATA" not in os.environ or not file.is_file():
        return None
    pairs = [json.loads(line) for line in file.read_text().splitlines()[:count]]
    return [chat(pair["question"], pair["answer"]) for pair in pairs]


def chat(question: str, answer: str) -> dict[str, Any]:
    return {"messages": [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]}


def write_rows(path: Path, rows: Sequence[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def gpu() -> bool:
    return Path("/dev/nvidiactl").exists()
