"""`ah plan`: exact counts from a config.json alone, and memory that moves the way it must."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from adapterhub.errors import ConfigError, Unsupported
from adapterhub.trainers.planning.memory import Setup, memory
from adapterhub.trainers.planning.shapes import ModelShape, _from_transformers, lora_parameters, model_shape

BASES = Path(__file__).parent / "bases"
Ah = Callable[..., Any]
Writer = Callable[..., Path]

# As their cards on the Hub count them.
PUBLISHED = {
    "llama-3-8b": 8_030_261_248,
    "llama-3-70b": 70_553_706_496,
    "llama-3.2-1b": 1_235_814_400,
    "llama-2-7b": 6_738_415_616,
    "mistral-7b-v0.3": 7_248_023_552,
    "qwen-7b": 7_721_324_544,
    "qwen2.5-7b": 7_615_616_512,
    "qwen3-8b": 8_190_735_360,
    "gemma-2b": 2_506_172_416,
    "gemma-2-9b": 9_241_705_984,
    "gemma-3-1b": 999_885_952,
    "phi-2": 2_779_683_840,
    "phi-3-mini-4k": 3_821_079_552,
    "phi-4": 14_659_507_200,
    "mixtral-8x7b": 46_702_792_704,
    "smollm2-135m": 134_515_008,
}


def shape(name: str) -> ModelShape:
    return model_shape(json.loads((BASES / f"{name}.json").read_text()), name=name)


@pytest.mark.parametrize(("name", "parameters"), PUBLISHED.items())
def test_parameters_are_those_of_the_model_card(name: str, parameters: int) -> None:
    assert shape(name).parameters == parameters


def test_an_adapter_on_llama_3_8b_has_the_known_size() -> None:
    assert lora_parameters(shape("llama-3-8b"), rank=16) == 41_943_040
    assert lora_parameters(shape("llama-3-8b"), rank=16, targets=["q_proj", "v_proj"]) == 6_815_744
    assert lora_parameters(shape("llama-3-8b"), rank=16, targets=r".*\.[qv]_proj") == 6_815_744


def test_targets_that_the_base_does_not_have_are_refused() -> None:
    with pytest.raises(ConfigError, match="has no layer 'w1'"):
        lora_parameters(shape("llama-3-8b"), rank=16, targets=["w1"])
    with pytest.raises(ConfigError, match="no regular expression"):
        lora_parameters(shape("llama-3-8b"), rank=16, targets="(")


def test_a_broken_config_is_refused() -> None:
    with pytest.raises(Unsupported, match="does not describe a llama"):
        model_shape({"model_type": "llama"})


def test_memory_falls_with_each_thing_that_saves_it() -> None:
    base, setup = shape("llama-3-8b"), Setup(rank=16, micro_batch=4, tokens=2048)
    total = memory(base, setup).total
    for change in ({"checkpointing": True}, {"micro_batch": 2}, {"base_bits": 4}, {"optimizer": "adam8bit"}):
        assert memory(base, replace(setup, **change)).total < total, change  # type: ignore[arg-type]
    assert memory(base, setup).weights == 2 * 8_030_261_248
    assert memory(base, setup).optimizer == 2 * 4 * 41_943_040


def test_plan_says_what_fits(ah: Ah, write_config: Writer, tmp_path: Path) -> None:
    folder = tmp_path / "llama-3-8b"
    folder.mkdir()
    (folder / "config.json").write_text((BASES / "llama-3-8b.json").read_text())
    keys = {"base_model": str(folder), "lora_r": 16, "sequence_len": 2048, "micro_batch_size": 4}
    config = write_config(**keys)
    answer = json.loads(ah("plan", config, "--gpu", "24GB", "--json").out)
    assert (answer["parameters"], answer["trainable"]) == (8_030_261_248, 41_943_040)
    assert answer["adapter_bytes"] == 4 * 41_943_040
    assert json.loads(ah("plan", config, "--gpu", "2GB", "--json").out)["fits"] is None
    told = ah("plan", config, "--gpu", "24GB")
    assert "41,943,040 trained" in told.err
    assert "fits 24GB with" in told.err
    refused = ah("plan", config, "--gpu", "big")
    assert (refused.code, "is no size" in refused.err) == (2, True)
    changed = write_config(**keys | answer["fits"])
    assert json.loads(ah("plan", changed, "--gpu", "24GB", "--json").out)["fits"] == {}


def test_plan_counts_what_a_method_adds(ah: Ah, write_config: Writer) -> None:
    def planned(**keys: Any) -> dict[str, Any]:
        found: dict[str, Any] = json.loads(ah("plan", write_config(**keys), "--json").out)
        return found

    plain = planned()
    dora = planned(peft_use_dora=True, adapterhub={"allow_unservable": True})
    assert dora["trainable"] == plain["trainable"] + 2 * (64 + 32 + 32 + 64 + 128 + 128 + 64)  # a magnitude an output
    converted = planned(peft_init_lora_weights="pissa")
    assert converted["adapter_bytes"] == 2 * plain["adapter_bytes"]
    assert planned(rl="dpo")["memory"]["activations"] == 2 * plain["memory"]["activations"]


@pytest.mark.slow
def test_a_probe_tells_the_steps_and_leaves_nothing(ah: Ah, write_config: Writer, tmp_path: Path) -> None:
    config = write_config(max_steps=None, num_epochs=2, report_to="none")
    before = sorted(tmp_path.rglob("*"))
    told = json.loads(ah("plan", config, "--probe", "--json").out)["probe"]
    assert told["steps"] == 12
    assert told["seconds"] == pytest.approx(12 * told["step_seconds"], abs=0.1)
    assert told["tokens_per_second"] > 0
    assert sorted(tmp_path.rglob("*")) == before


def test_plan_names_a_base_that_is_not_there(ah: Ah, write_config: Writer) -> None:
    found = ah("plan", write_config(base_model="./none"))
    assert found.code == 2
    assert "has no config.json" in found.err


@pytest.mark.slow
@pytest.mark.parametrize("name", sorted(p.stem for p in BASES.glob("*.json") if not p.stem.startswith("qwen-")))
def test_a_written_shape_is_that_of_transformers(name: str) -> None:
    config = json.loads((BASES / f"{name}.json").read_text()) | {"num_hidden_layers": 1}
    written, built = model_shape(config, name=name), _from_transformers(config, name)
    assert written.parameters == built.parameters
    assert {(x.name, x.inputs, x.outputs, x.bias) for x in written.linears} == {
        (x.name, x.inputs, x.outputs, x.bias) for x in built.linears
    }
    assert (written.experts, written.experts_used, written.head) == (built.experts, built.experts_used, built.head)
