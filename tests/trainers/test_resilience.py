"""A run that is killed, runs out of memory, gets worse or diverges."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from adapterhub.errors import ConfigError, MissingDependency, RunFailed
from adapterhub.trainers import read_run, resume
from adapterhub.trainers.events import Event, Stage
from adapterhub.trainers.shortage import OutOfMemory
from tests.trainers.conftest import PAIRS, trained

pytestmark = pytest.mark.slow

Writer = Callable[..., Path]
KILLED = """
import os, signal, sys
from pathlib import Path
from adapterhub.trainers import prepare, read_config, read_yaml, train
from adapterhub.trainers.events import Step

def kill(event):
    if isinstance(event, Step) and event.step == 4:
        os.kill(os.getpid(), signal.SIGKILL)

config = Path(sys.argv[1])
reading = read_config(read_yaml(config))
train(reading, prepare(reading.config, beside={"datasets": config.parent}), on_event=kill)
"""


def losses(folder: Path) -> list[tuple[int, float]]:
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [(line["step"], line["loss"]) for line in lines if "loss" in line]


def adapter(folder: Path) -> bytes:
    return (folder / "adapter" / "adapter_model.safetensors").read_bytes()


@pytest.mark.parametrize("method", [None, "dpo"])
def test_a_killed_run_goes_on_with_the_same_loss_curve(
    method: str | None, write_config: Writer, tmp_path: Path
) -> None:
    keys = {"max_steps": 6, "save_strategy": "steps", "save_steps": 3, "lora_dropout": 0.1}
    keys |= {"rl": method, "rows": PAIRS} if method else {}
    config = write_config(**keys, output_dir=str(tmp_path / "killed"))
    environment = os.environ | {"OMP_WAIT_POLICY": "passive"}
    died = subprocess.run([sys.executable, "-c", KILLED, config], env=environment, capture_output=True, timeout=600)
    assert died.returncode == -9
    folder = tmp_path / "killed"
    assert [step for step, _ in losses(folder)] == [1, 2, 3, 4]
    resume(folder, read_run(folder))
    whole = trained(write_config(**keys, output_dir=str(tmp_path / "whole"))).folder
    assert losses(folder) == losses(whole)
    assert adapter(folder) == adapter(whole)


@pytest.fixture
def small_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    """A device on which the model finds no room for more than two rows, side by side or one behind the other."""
    import torch
    from transformers import LlamaForCausalLM

    forward = LlamaForCausalLM.forward

    def cramped(self: Any, input_ids: Any = None, cu_seq_lens_q: Any = None, **options: Any) -> Any:
        if (len(input_ids) if cu_seq_lens_q is None else len(cu_seq_lens_q) - 1) > 2:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")
        return forward(self, input_ids=input_ids, cu_seq_lens_q=cu_seq_lens_q, **options)

    cramped.__signature__ = __import__("inspect").signature(forward)  # type: ignore[attr-defined]
    monkeypatch.setattr(LlamaForCausalLM, "forward", cramped)


def test_auto_batch_goes_on_with_the_same_rows_a_step(write_config: Writer, tmp_path: Path, small_memory: None) -> None:
    events: list[Event] = []
    config = write_config(micro_batch_size=8, output_dir=str(tmp_path / "auto"))
    auto = trained(config, on_event=events.append, auto_batch=True)
    tries = [e.text for e in events if isinstance(e, Stage) and e.text.startswith("out of memory")]
    assert tries == [f"out of memory; going on with micro_batch_size {n}" for n in (4, 2)]
    resolved = (auto.folder / "config.resolved.yml").read_text()
    assert "micro_batch_size: 2" in resolved
    assert "gradient_accumulation_steps: 4" in resolved
    fixed = write_config(micro_batch_size=2, gradient_accumulation_steps=4, output_dir=str(tmp_path / "fixed"))
    assert losses(auto.folder) == losses(trained(fixed).folder)


def test_out_of_memory_says_what_takes_it_and_what_to_lower(write_config: Writer, small_memory: None) -> None:
    with pytest.raises(OutOfMemory, match="out of memory") as caught:
        trained(write_config(micro_batch_size=4))
    assert "planned: " in caught.value.why
    assert caught.value.hint.startswith("add --auto-batch, or ")
    assert "micro_batch_size" in caught.value.hint or "qlora" in caught.value.hint


def test_auto_batch_gives_up_where_nothing_can_be_halved(write_config: Writer, small_memory: None) -> None:
    with pytest.raises(OutOfMemory) as caught:
        trained(write_config(micro_batch_size=3), auto_batch=True)
    assert "--auto-batch" not in caught.value.hint


def test_a_run_that_gets_worse_stops_early_and_keeps_the_best(write_config: Writer, write_rows: Any) -> None:
    other = {"messages": [{"role": "user", "content": "Say 1."}, {"role": "assistant", "content": "zzzzzzzz"}]}
    write_rows([other], name="eval.jsonl")
    result = trained(
        write_config(
            max_steps=40,
            learning_rate=0.05,
            test_datasets=[{"path": "eval.jsonl"}],
            eval_steps=1,
            early_stopping_patience=2,
        )
    )
    lines = [json.loads(line) for line in (result.folder / "metrics.jsonl").read_text().splitlines()]
    evals = [line["eval_loss"] for line in lines if "eval_loss" in line]
    assert result.fitted.steps < 40
    assert result.fitted.eval_loss == min(evals)
    assert evals.index(min(evals)) == len(evals) - 3
    page = (result.folder / "report.html").read_text()
    assert f"{min(evals):.3f}</text>" in page  # the number that stands at the curve is that of what was kept
    assert "evaluation loss, best" in page


def test_the_watchdog_ends_a_run_whose_loss_stays_high(write_config: Writer) -> None:
    config = write_config(loss_watchdog_threshold=0.001, loss_watchdog_patience=2, max_steps=10)
    with pytest.raises(RunFailed, match="at step 2") as caught:
        trained(config)
    assert "loss_watchdog_threshold 0.001 for 2 logged steps" in caught.value.why


def test_tensorboard_is_told_the_losses(write_config: Writer) -> None:
    from tensorboardX.proto import event_pb2

    folder = trained(write_config(use_tensorboard=True)).folder
    data = next((folder / "tensorboard").glob("events.out.tfevents.*")).read_bytes()
    found, at = [], 0
    while at < len(data):  # length (8 bytes), its checksum (4), the event, its checksum (4)
        size = int.from_bytes(data[at : at + 8], "little")
        event = event_pb2.Event.FromString(data[at + 12 : at + 12 + size])
        found += [(event.step, v.simple_value) for v in event.summary.value if v.tag == "train/loss"]
        at += 16 + size
    assert found == [(step, pytest.approx(loss, rel=1e-6)) for step, loss in losses(folder)]


def test_a_tracker_that_is_not_installed_is_named_before_the_model_is_loaded(write_config: Writer) -> None:
    with pytest.raises(MissingDependency, match="report_to: mlflow is not installed"):
        trained(write_config(use_mlflow=True))
    with pytest.raises(ConfigError, match="contradicts"):
        trained(write_config(load_best_model_at_end=True))
