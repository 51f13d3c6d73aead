"""A real training of the tiny base, and everything that it leaves behind."""

from __future__ import annotations

import hashlib
import json
import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from safetensors.numpy import load_file

from adapterhub import peftdir
from adapterhub.base import find_base
from adapterhub.errors import AlreadyExists, DataError, NotFound, RunFailed
from adapterhub.runrecord import RunRecord
from adapterhub.trainers import (
    Interrupted,
    read_run,
    resume,
    train,
)
from adapterhub.trainers.events import Evaluated, Event, Started, Step
from adapterhub.trainers.methods import sft
from tests.trainers.conftest import begin, chat, trained

pytestmark = pytest.mark.slow

Writer = Callable[..., Path]


def weights(folder: Path) -> dict[str, bytes]:
    return {p.name: p.read_bytes() for p in sorted((folder / "adapter").iterdir())}


def losses(folder: Path) -> list[tuple[int, float]]:
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [(line["step"], line["loss"]) for line in lines if "loss" in line]


def test_a_run_leaves_an_adapter_that_the_registry_takes(write_config: Writer, tmp_path: Path, tiny_base: Path) -> None:
    config = write_config(
        val_set_size=2, adapterhub={"name": "acme/support", "channel": "canary", "labels": {"a": "b"}}
    )
    events: list[Event] = []
    reading, prepared = begin(config)
    result = train(reading, prepared, on_event=events.append)

    adapter = peftdir.read(result.adapter)
    assert (adapter.shape.rank, adapter.shape.alpha) == (4, 32)
    assert set(adapter.shape.target_modules) == {
        "q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"
    }  # fmt: skip
    assert adapter.shape.parameters == prepared.lora_parameters
    assert peftdir.verdicts(adapter).serve.answer == "yes"
    assert adapter.config["base_model_name_or_path"] == tiny_base.name
    assert sorted(p.name for p in result.adapter.iterdir()) == [
        "adapter_config.json", "adapter_model.safetensors", "chat_template.jinja", "training.yml"
    ]  # fmt: skip

    record = RunRecord.read(result.folder / "run.json")
    assert record.base == find_base(str(tiny_base)).fingerprint
    assert (str(record.name), record.channel, record.labels) == ("acme/support", "canary", {"a": "b"})
    template = (result.adapter / "chat_template.jinja").read_bytes()
    assert record.chat_template_sha256 == hashlib.sha256(template).hexdigest()
    assert record.tokenizer_sha256 == hashlib.sha256((tiny_base / "tokenizer.json").read_bytes()).hexdigest()
    assert record.lineage.method == "sft"
    assert record.lineage.data_sha256 == (hashlib.sha256((tmp_path / "train.jsonl").read_bytes()).hexdigest(),)
    assert record.lineage.metrics["eval_loss"] == pytest.approx(result.fitted.eval_loss, abs=1e-6)

    steps = [event for event in events if isinstance(event, Step)]
    assert [step.step for step in steps] == [1, 2, 3]
    assert all(step.tokens_per_second > 0 for step in steps)
    assert Started(steps=3, done=0) in events
    assert [event.loss for event in events if isinstance(event, Evaluated)] == [result.fitted.eval_loss]


def test_rows_behind_each_other_are_trained_on_as_rows_side_by_side(
    write_config: Writer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = [chat(f"Say {i}. " * (i % 5 + 1), f"Ahoy, {i}! " * (i % 7 + 1)) for i in range(12)]
    keys = {"rows": rows, "micro_batch_size": 4, "train_on_inputs": True}
    behind = trained(write_config(**keys, gradient_checkpointing=True, output_dir=str(tmp_path / "behind")))
    monkeypatch.setattr(sft, "takes_blocks", lambda model: False)
    beside = trained(write_config(**keys, output_dir=str(tmp_path / "beside")))
    assert [loss for _, loss in losses(behind.folder)] == pytest.approx([x for _, x in losses(beside.folder)], rel=1e-4)
    assert behind.fitted.tokens == beside.fitted.tokens


def test_packed_rows_take_fewer_steps(write_config: Writer) -> None:
    config = write_config(sample_packing=True, max_steps=None, micro_batch_size=1, sequence_len=128, val_set_size=2)
    reading, prepared = begin(config)
    result = train(reading, prepared)
    assert result.fitted.steps == 4  # for ten rows of about 34 tokens
    assert result.fitted.tokens == prepared.train.tokens
    assert result.fitted.eval_loss is not None


def test_a_run_folder_tells_the_whole_story(write_config: Writer, tmp_path: Path) -> None:
    config = write_config(sample_packing=True)
    folder = trained(config).folder
    assert (folder / "config.yml").read_text() == config.read_text()
    resolved = yaml.safe_load((folder / "config.resolved.yml").read_text())
    assert (resolved["seed"], resolved["datasets"][0]["path"]) == (42, str(tmp_path / "train.jsonl"))
    fates = {entry["key"]: entry for entry in json.loads((folder / "keys.json").read_text())}
    assert fates["sample_packing"]["kind"] == "honoured"
    data = json.loads((folder / "data.json").read_text())
    assert (data["train"]["rows"], data["files"][0]["format"]) == (12, "messages")
    assert [step for step, _ in losses(folder)] == [1, 2, 3]
    assert (folder / "curves.png").read_bytes().startswith(b"\x89PNG")
    page = (folder / "report.html").read_text()
    assert "<svg" in page
    assert "acme/support" in page
    assert "src=" not in page and "href=" not in page.replace('xlink:href="#', "")  # needs nothing else


def test_training_learns_and_the_loss_is_that_of_plain_transformers(write_config: Writer, tiny_base: Path) -> None:
    """Our loss looks at trained positions only; the first step's must be the model's own mean loss."""
    import torch
    from transformers import AutoModelForCausalLM

    config = write_config(micro_batch_size=12, max_steps=30)
    _, prepared = begin(config)
    model = AutoModelForCausalLM.from_pretrained(tiny_base, dtype=torch.float32)
    total = count = 0.0
    for example in prepared.train.examples:
        with torch.no_grad():
            loss = model(input_ids=torch.tensor([example.input_ids]), labels=torch.tensor([example.labels])).loss
        total, count = total + float(loss) * example.trained, count + example.trained
    found = losses(trained(config).folder)
    assert found[0][1] == pytest.approx(total / count, rel=1e-5)
    assert found[-1][1] < 0.6 * found[0][1]


def test_bfloat16_trains_to_about_the_same(write_config: Writer, tmp_path: Path) -> None:
    exact = trained(write_config(max_steps=4, output_dir=str(tmp_path / "exact")))
    half = trained(write_config(max_steps=4, output_dir=str(tmp_path / "half")), bf16=True)
    assert [loss for _, loss in losses(half.folder)] != [loss for _, loss in losses(exact.folder)]
    for (_, ours), (_, theirs) in zip(losses(half.folder), losses(exact.folder), strict=True):
        assert ours == pytest.approx(theirs, rel=0.03)


def test_accumulation_is_the_same_as_a_larger_batch(write_config: Writer, tmp_path: Path) -> None:
    config = write_config(max_steps=1, micro_batch_size=12)
    one = trained(config, output_dir=str(tmp_path / "one"))
    many = trained(config, output_dir=str(tmp_path / "many"), micro_batch_size=3, gradient_accumulation_steps=4)
    assert losses(many.folder)[0][1] == pytest.approx(losses(one.folder)[0][1], rel=1e-5)


def test_the_same_seed_gives_the_same_bytes_and_another_one_others(write_config: Writer, tmp_path: Path) -> None:
    config = write_config(lora_dropout=0.1)
    first, second, other = (
        trained(config, output_dir=str(tmp_path / str(i)), seed=seed) for i, seed in enumerate((7, 7, 8))
    )
    assert weights(first.folder) == weights(second.folder)
    assert first.record == second.record
    assert weights(first.folder) != weights(other.folder)


def test_rslora_and_targets_reach_the_adapter(write_config: Writer) -> None:
    config = write_config(peft_use_rslora=True, lora_target_modules=["q_proj", "down_proj"])
    shape = peftdir.read(trained(config).adapter).shape
    assert (shape.rslora, shape.target_modules) == (True, ("down_proj", "q_proj"))


def test_ctrl_c_saves_a_checkpoint_and_the_run_goes_on_the_same(write_config: Writer, tmp_path: Path) -> None:
    config = write_config(max_steps=6)
    whole = trained(config, output_dir=str(tmp_path / "whole"))
    reading, prepared = begin(config, output_dir=str(tmp_path / "broken"))

    def interrupt(event: Event) -> None:
        if isinstance(event, Step) and event.step == 2:
            os.kill(os.getpid(), signal.SIGINT)

    before = signal.getsignal(signal.SIGINT)
    with pytest.raises(Interrupted) as caught:
        train(reading, prepared, on_event=interrupt)
    assert signal.getsignal(signal.SIGINT) is before
    folder = tmp_path / "broken"
    assert caught.value.exit_code == 130
    assert caught.value.hint == f"ah train --resume {folder}"
    assert not (folder / "run.json").exists()
    assert not (folder / "adapter").exists()

    resume(folder, read_run(folder))
    assert losses(folder) == losses(whole.folder)
    assert weights(folder) == weights(whole.folder)
    with pytest.raises(AlreadyExists, match="is finished"):
        read_run(folder)


def test_a_run_does_not_go_on_with_other_data(write_config: Writer, tmp_path: Path) -> None:
    config = write_config(save_strategy="steps", save_steps=1)
    folder = trained(config).folder
    (folder / "run.json").unlink()  # as if it had been killed before its end
    data = tmp_path / "train.jsonl"
    data.write_text(data.read_text().replace("Ahoy", "Ahem"))
    with pytest.raises(DataError, match="is not what the run began with"):
        read_run(folder)


def test_a_run_that_cannot_go_on_says_why(write_config: Writer, tmp_path: Path) -> None:
    with pytest.raises(NotFound, match="is not a run folder"):
        read_run(tmp_path)
    folder = trained(write_config()).folder
    (folder / "run.json").unlink()
    with pytest.raises(NotFound, match="has no checkpoint"):
        read_run(folder)


def test_a_loss_that_is_no_number_ends_the_run(write_config: Writer, tmp_path: Path) -> None:
    config = write_config(learning_rate=1.0, max_steps=200, optimizer="sgd", max_grad_norm=0.0, lora_alpha=1e30)
    with pytest.raises(RunFailed, match="the loss is") as caught:
        trained(config)
    assert "learning_rate" in caught.value.hint
    assert not (tmp_path / "run" / "run.json").exists()


def test_a_4_bit_base_is_trained_on(write_config: Writer) -> None:
    result = trained(write_config(adapter="qlora", load_in_4bit=True))
    assert peftdir.verdicts(peftdir.read(result.adapter)).serve.answer == "yes"


def test_an_8_bit_base_is_trained_on(write_config: Writer) -> None:
    result = trained(write_config(load_in_8bit=True))
    assert peftdir.verdicts(peftdir.read(result.adapter)).serve.answer == "yes"


def test_patterns_and_layers_reach_the_adapter_and_are_counted(write_config: Writer) -> None:
    config = write_config(
        lora_rank_pattern={"q_proj": 2}, lora_alpha_pattern={"v_proj": 5.0}, peft_layers_to_transform=[1]
    )
    reading, prepared = begin(config)
    adapter = peftdir.read(train(reading, prepared).adapter)
    assert all(".layers.1." in factor.module for factor in adapter.factors)
    found = {factor.module.rsplit(".", 1)[-1]: (factor.rank, factor.scale) for factor in adapter.factors}
    assert (found["q_proj"], found["v_proj"], found["k_proj"]) == ((2, 16.0), (4, 1.25), (4, 8.0))
    assert adapter.shape.parameters == prepared.lora_parameters


def test_loraplus_lets_b_learn_faster(write_config: Writer, tmp_path: Path) -> None:
    config = write_config(max_steps=1, optimizer="sgd", max_grad_norm=0.0, lr_scheduler="constant", warmup_steps=0)

    def b_norm(**keys: Any) -> float:
        file = trained(config, **keys).adapter / "adapter_model.safetensors"
        return float(sum((v.astype("f8") ** 2).sum() for k, v in load_file(file).items() if "lora_B" in k) ** 0.5)

    plain = b_norm(output_dir=str(tmp_path / "plain"))
    faster = b_norm(output_dir=str(tmp_path / "plus"), loraplus_lr_ratio=16.0)
    assert faster == pytest.approx(16 * plain, rel=1e-3)
