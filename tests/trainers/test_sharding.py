"""FSDP and DeepSpeed keys reach transformers, in its own words."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import pytest

from adapterhub.errors import MissingDependency
from adapterhub.trainers.dialect import Machine, Reading, parse_yaml, read_config
from adapterhub.trainers.sharding import sharding

FSDP = """
base_model: x
datasets: [{path: train.jsonl}]
fsdp: [full_shard, auto_wrap, offload]
fsdp_version: 1
fsdp_config:
  fsdp_transformer_layer_cls_to_wrap: LlamaDecoderLayer
  fsdp_state_dict_type: FULL_STATE_DICT
  fsdp_offload_params: true
"""
DEEPSPEED = "base_model: x\ndatasets: [{path: train.jsonl}]\ndeepspeed: {zero_optimization: {stage: 2}}\n"


def read(text: str, *, gpu: bool = True) -> Reading:
    return read_config(parse_yaml(text, source="config.yml"), machine=Machine(gpu=gpu))


def test_transformers_takes_what_fsdp_becomes(tmp_path: Path) -> None:
    from transformers import TrainingArguments

    asked: dict[str, Any] = dict(sharding(read(FSDP).config, gpu=True))
    plugin = TrainingArguments(output_dir=str(tmp_path), use_cpu=True, **asked).fsdp_plugin_args
    assert plugin["fsdp_version"] == 1
    assert plugin["transformer_cls_names_to_wrap"] == "LlamaDecoderLayer"
    assert plugin["cpu_offload"] is True


def test_deepspeed_that_is_not_installed_is_named_with_the_command() -> None:
    if importlib.util.find_spec("deepspeed"):
        pytest.skip("deepspeed is installed: nothing is missing that could be named")
    with pytest.raises(MissingDependency) as caught:
        sharding(read(DEEPSPEED).config, gpu=True)
    assert caught.value.hint == "pip install deepspeed"


@pytest.mark.parametrize("text", [FSDP, DEEPSPEED])
def test_a_machine_without_gpus_says_that_nothing_is_sharded(text: str) -> None:
    reading = read(text, gpu=False)
    assert sharding(reading.config, gpu=False) == {}
    kinds = {f.key: f.kind for f in reading.fates}
    assert {kinds[key] for key in ("fsdp", "fsdp_config", "deepspeed") if key in kinds} == {"without effect"}
    assert {f.kind for f in read(text).fates if f.key in ("fsdp", "fsdp_config", "deepspeed")} == {"honoured"}
