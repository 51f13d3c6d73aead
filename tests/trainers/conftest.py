"""What the trainers' tests share: rows, configs, and a way to run `ah train`."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import yaml

from adapterhub.cli import output
from adapterhub.cli.main import main
from adapterhub.trainers import Prepared, Reading, Result, prepare, read_config, read_yaml, train
from adapterhub.trainers.events import Listener, ignore

RowsWriter = Callable[..., Path]
ConfigWriter = Callable[..., Path]
PAIRS = [
    {"messages": [{"role": "user", "content": f"Say {i}."}], "chosen": f"Ahoy, {i}!", "rejected": f"Hi {i}, what?"}
    for i in range(12)
]
# What everybody has, in Axolotl's words.
SEED = """\
base_model: {base}
model_type: LlamaForCausalLM
datasets:
  - path: train.jsonl
    type: sharegpt
adapter: lora
lora_r: 16
lora_alpha: 32
lora_dropout: 0.05
lora_target_modules: [q_proj, v_proj]
sequence_len: 2048
train_on_inputs: false
flash_attention: true
bf16: true
micro_batch_size: 2
gradient_accumulation_steps: 8
num_epochs: 3
learning_rate: 0.0002
optimizer: adamw_bnb_8bit
lr_scheduler: cosine
warmup_ratio: 0.05
"""


def chat(*texts: str, system: str | None = None) -> dict[str, Any]:
    """A row of alternating user and assistant messages."""
    messages = [{"role": "system", "content": system}] if system else []
    messages += [{"role": ("user", "assistant")[i % 2], "content": text} for i, text in enumerate(texts)]
    return {"messages": messages}


@pytest.fixture
def write_rows(tmp_path: Path) -> RowsWriter:
    """Writes a JSONL file: ``write_rows([row, …], name="train.jsonl")``."""

    def write(rows: Iterable[Mapping[str, Any]], name: str = "train.jsonl") -> Path:
        path = tmp_path / name
        path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
        return path

    return write


@pytest.fixture
def write_config(tmp_path: Path, tiny_base: Path, write_rows: RowsWriter) -> ConfigWriter:
    """Writes a config that trains the tiny base in three steps; keyword arguments set keys, None takes one out."""

    def write(*, rows: Iterable[Mapping[str, Any]] | None = None, **keys: Any) -> Path:
        data = write_rows(rows or [chat(f"Say {i}.", f"Ahoy, {i}!") for i in range(12)])
        values = {
            "base_model": str(tiny_base),
            "datasets": [{"path": data.name}],
            "adapter": "lora",
            "lora_r": 4,
            "micro_batch_size": 2,
            "max_steps": 3,
            "learning_rate": 0.01,
            "bf16": False,  # the same numbers on every CPU
            "save_strategy": "no",
            "output_dir": str(tmp_path / "run"),
            "adapterhub": {"name": "acme/support"},
        }
        path = tmp_path / "config.yml"
        kept = {key: value for key, value in (values | keys).items() if value is not None}
        path.write_text(yaml.safe_dump(kept, sort_keys=False))
        return path

    return write


def begin(config: Path, **changes: Any) -> tuple[Reading, Prepared]:
    """A training that needs only its weights. ``changes``: of the config that was read."""
    reading = read_config(read_yaml(config))
    reading = replace(reading, config=replace(reading.config, **changes))
    near = dict.fromkeys(("datasets", "test_datasets", "lora_model_dir"), config.parent)
    return reading, prepare(reading.config, beside=near)


def trained(config: Path, *, on_event: Listener = ignore, auto_batch: bool = False, **changes: Any) -> Result:
    return train(*begin(config, **changes), on_event=on_event, auto_batch=auto_batch)


@dataclass(frozen=True)
class Ran:
    """What a command answered."""

    code: int
    out: str
    err: str


@pytest.fixture
def ah(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Callable[..., Ran]:
    """Runs `ah …` in this process, as its entry point does."""

    def run(*arguments: object) -> Ran:
        for console in (output.out, output.err):
            console.cache_clear()  # they hold the streams of the test before
        monkeypatch.setattr(sys, "argv", ["ah", *map(str, arguments)])
        monkeypatch.setenv("COLUMNS", "200")
        try:
            main()
            code = 0
        except SystemExit as end:
            code = int(end.code or 0)
        captured = capsys.readouterr()
        return Ran(code, captured.out, captured.err)

    return run
