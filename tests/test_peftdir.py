from __future__ import annotations

import json
import math
import re
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from adapterhub import peftdir
from adapterhub.errors import AdapterError

Factory = Callable[..., Path]
PREFIX = "base_model.model.model.layers.0.self_attn.q_proj"


def change_tensors(path: Path, change: Callable[[dict[str, Any]], None]) -> None:
    tensors = load_file(path / peftdir.WEIGHTS)
    change(tensors)
    save_file(tensors, path / peftdir.WEIGHTS)


def write_header(path: Path, header: dict[str, Any], *, data: bytes = b"") -> None:
    text = json.dumps(header).encode()
    (path / peftdir.WEIGHTS).write_bytes(struct.pack("<Q", len(text)) + text + data)


def test_a_whole_adapter_is_read(adapter_factory: Factory) -> None:
    adapter = peftdir.read(adapter_factory(rank=8, alpha=16, targets=["q_proj", "down_proj"]))
    assert adapter.shape.rank == 8
    assert adapter.shape.alpha == 16
    assert adapter.shape.target_modules == ("down_proj", "q_proj")
    assert adapter.shape.dtype == "F32"
    assert adapter.shape.parameters == sum(math.prod(t.shape) for t in adapter.tensors.values())
    factor = next(f for f in adapter.factors if f.module == "model.layers.1.mlp.down_proj")
    assert factor.scale == 2
    assert factor.a.shape == (8, 128)
    assert factor.b.shape == (64, 8)
    assert not adapter.others
    assert {v.answer for v in vars(peftdir.verdicts(adapter)).values()} == {"yes"}


def test_scales_follow_rslora_and_alpha_patterns(adapter_factory: Factory) -> None:
    plain = peftdir.read(adapter_factory("plain", rank=4, alpha=8))
    assert {f.scale for f in plain.factors} == {2.0}
    rooted = peftdir.read(adapter_factory("rs", rank=4, alpha=8, config={"use_rslora": True}))
    assert {f.scale for f in rooted.factors} == {4.0}
    assert rooted.shape.rslora
    pattern = {"alpha_pattern": {"layers.0.self_attn.q_proj": 32}}
    varied = {f.module: f.scale for f in peftdir.read(adapter_factory("p", rank=4, alpha=8, config=pattern)).factors}
    assert varied["model.layers.0.self_attn.q_proj"] == 8
    assert varied["model.layers.1.self_attn.q_proj"] == 2


@pytest.mark.parametrize("key", ["q_proj", "layers.0.q_proj", "proj", r".*\.0\..*q_proj", "up_proj|q_proj", "model.q"])
@pytest.mark.parametrize("module", ["model.layers.0.q_proj", "q_proj", "model.layers.10.q_proj", "model.xq_proj"])
def test_patterns_mean_what_peft_means_by_them(key: str, module: str) -> None:
    ours = peftdir.pattern_value({key: 5}, module, None) == 5
    theirs = any(re.match(rf"(.*\.)?({k})$", module) for k in [key])  # peft.utils.other.get_pattern_key
    assert ours == theirs


@pytest.mark.parametrize(
    ("config", "reason"),
    [
        ({"use_dora": True}, "DoRA"),
        ({"bias": "all"}, "bias"),
        ({"lora_bias": True}, "lora_bias"),
        ({"alora_invocation_tokens": [1, 2]}, "aLoRA"),
        ({"use_qalora": True}, "QALoRA"),
        ({"trainable_token_indices": [1]}, "trainable tokens"),
        ({"target_parameters": ["experts.down_proj"]}, "fused experts"),
        ({"layer_replication": [[0, 2], [1, 2]]}, "replication"),
        ({"init_lora_weights": "pissa_niter_4"}, "pissa"),
        ({"init_lora_weights": "olora"}, "olora"),
        ({"init_lora_weights": "loftq"}, "loftq"),
        ({"modules_to_save": ["lm_head"]}, "lm_head"),
    ],
)
def test_what_the_engine_cannot_serve_is_said(adapter_factory: Factory, config: dict[str, Any], reason: str) -> None:
    serve = peftdir.verdicts(peftdir.read(adapter_factory(config=config))).serve
    assert serve.answer == "no"
    assert reason in serve.reason
    assert serve.engine.startswith("vllm")


@pytest.mark.parametrize(
    "config",
    [
        {"init_lora_weights": "lora_ga"},
        {"init_lora_weights": "corda"},
        {"kasa_config": {"beta": 1e-4}},
        {"use_bdlora": {"nblocks": 2}},
        {"monteclora_config": {"num_samples": 8}},
        {"arrow_config": {"top_k": 3}},
    ],
)
def test_what_is_no_sum_with_the_base_is_neither_served_nor_merged(
    adapter_factory: Factory, config: dict[str, Any]
) -> None:
    judged = peftdir.verdicts(peftdir.read(adapter_factory(config=config)))
    assert {v.answer for v in vars(judged).values()} == {"no"}
    assert str(next(iter(config.values()))) in judged.merge.reason or next(iter(config)) in judged.merge.reason


def test_classifier_heads_are_served_but_not_merged(adapter_factory: Factory) -> None:
    path = adapter_factory(config={"modules_to_save": ["score"]})
    change_tensors(path, lambda t: t.update({"base_model.model.score.weight": np.ones((2, 64), dtype=np.float32)}))
    judged = peftdir.verdicts(peftdir.read(path))
    assert judged.serve.answer == "yes"
    assert judged.merge.answer == "no"


def test_ranks_are_bounded_by_the_engine(adapter_factory: Factory) -> None:
    def answer(rank: int) -> str:
        return peftdir.verdicts(peftdir.read(adapter_factory(f"r{rank}", rank=rank, targets=["q_proj"]))).serve.answer

    assert answer(512) == "yes"
    assert answer(513) == "no"


def test_a_folder_without_config_is_no_adapter(tmp_path: Path) -> None:
    with pytest.raises(AdapterError, match=r"no adapter_config\.json"):
        peftdir.read(tmp_path)
    with pytest.raises(AdapterError, match="no such folder"):
        peftdir.read(tmp_path / "nowhere")


@pytest.mark.parametrize("name", ["adapter_model.bin", "adapter_model.pt", "weights.pkl"])
def test_pickles_are_refused_with_the_way_out(adapter_factory: Factory, name: str) -> None:
    path = adapter_factory()
    (path / peftdir.WEIGHTS).rename(path / name)
    with pytest.raises(AdapterError, match="pickle") as refused:
        peftdir.read(path)
    assert "save_pretrained" in refused.value.hint


@pytest.mark.parametrize("kept", [0, 4, 8, 100, -1, -5000])
def test_truncated_weights_are_refused(adapter_factory: Factory, kept: int) -> None:
    path = adapter_factory()
    data = (path / peftdir.WEIGHTS).read_bytes()
    (path / peftdir.WEIGHTS).write_bytes(data[:kept])
    with pytest.raises(AdapterError, match="truncated"):
        peftdir.read(path)


@pytest.mark.parametrize(
    "header",
    [
        {"x": 3},
        {"x": {"dtype": "F32", "shape": [1]}},
        {"x": {"dtype": "F32", "shape": [2], "data_offsets": [0, 4]}},
        {"x": {"dtype": "F32", "shape": [1], "data_offsets": [-8, -4]}},
        {"x": {"dtype": "F32", "shape": [1], "data_offsets": [4, 0]}},
        {
            "x": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]},
            "y": {"dtype": "F32", "shape": [1], "data_offsets": [4, 8]},
        },
    ],
)
def test_broken_headers_are_refused(adapter_factory: Factory, header: dict[str, Any]) -> None:
    path = adapter_factory()
    write_header(path, header, data=bytes(8))
    with pytest.raises(AdapterError):
        peftdir.read(path)


@pytest.mark.parametrize("text", ["[]", "not json", '{"peft_type": "IA3"}', "3"])
def test_other_configs_are_refused(adapter_factory: Factory, text: str) -> None:
    path = adapter_factory()
    (path / peftdir.CONFIG).write_text(text)
    with pytest.raises(AdapterError):
        peftdir.read(path)


def test_factors_must_come_in_pairs_that_fit(adapter_factory: Factory) -> None:
    lonely = adapter_factory("lonely")
    change_tensors(lonely, lambda t: t.pop(f"{PREFIX}.lora_B.weight"))
    with pytest.raises(AdapterError, match="only one"):
        peftdir.read(lonely)
    crooked = adapter_factory("crooked")
    wide = np.ones((64, 5), dtype=np.float32)
    change_tensors(crooked, lambda t: t.update({f"{PREFIX}.lora_B.weight": wide}))
    with pytest.raises(AdapterError, match="do not fit each other"):
        peftdir.read(crooked)


def test_weights_without_factors_are_refused(adapter_factory: Factory) -> None:
    path = adapter_factory()
    save_file({"lm_head.weight": np.ones((2, 2), dtype=np.float32)}, path / peftdir.WEIGHTS)
    with pytest.raises(AdapterError, match="no LoRA factors"):
        peftdir.read(path)
