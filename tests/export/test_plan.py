"""What cannot be exported is refused from headers alone, before a byte is written."""

from __future__ import annotations

import json
import os
import struct
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from safetensors.numpy import load_file, save_file

from adapterhub.base import BaseModel, find_base
from adapterhub.errors import (
    AdapterError,
    AdapterHubError,
    AlreadyExists,
    BaseMismatch,
    StorageError,
    Unsupported,
    UsageError,
)
from adapterhub.export import plan_export


def test_a_plan_counts_and_writes_nothing(base_factory: Any, adapter_factory: Any, tmp_path: Path) -> None:
    base = base_factory(dtype="bfloat16", shards=3)
    adapter = adapter_factory(targets=["q_proj", "down_proj"])
    before = sorted(tmp_path.rglob("*"))

    plan = plan_export(adapter, base, tmp_path / "deep" / "out", dtype="float32")

    assert sorted(tmp_path.rglob("*")) == before
    told = plan.to_json()
    assert told["tensors"] == {"merged": 4, "quantised": 0, "saved": 0, "cast": 17, "kept": 0}
    assert told["bytes_read"] == sum(f.stat().st_size for f in base.weight_files)
    assert 2 * 0.9 < told["bytes_written"] / told["bytes_read"] < 2 * 1.1
    assert told["bytes_merged"] == 4 * 2 * (64 * 64 + 128 * 64)
    assert 0 < told["memory"] < 400e6
    assert told["disk_free"] > 0


def test_the_scale_and_the_tensor_of_every_factor(base_factory: Any, adapter_factory: Any, tmp_path: Path) -> None:
    adapter = adapter_factory(
        rank=4, alpha=8, targets=["q_proj", "k_proj"], config={"use_rslora": True, "alpha_pattern": {"k_proj": 3}}
    )
    plan = plan_export(adapter, base_factory(), tmp_path / "out")
    scales = {op.source.name.split(".")[4]: op.delta.factor.scale for op in plan.merged if op.delta}
    assert scales == {"q_proj": 8 / 2, "k_proj": 3 / 2}


Break = Callable[[BaseModel, Path], None]


def _config(**changes: Any) -> Break:
    def change(_: BaseModel, adapter: Path) -> None:
        file = adapter / "adapter_config.json"
        file.write_text(json.dumps(json.loads(file.read_text()) | changes))

    return change


def _base_config(**changes: Any) -> Break:
    def change(base: BaseModel, _: Path) -> None:
        file = base.path / "config.json"
        file.write_text(json.dumps(json.loads(file.read_text()) | changes))

    return change


def _index(change: Callable[[dict[str, str]], dict[str, str]]) -> Break:
    def rewrite(base: BaseModel, _: Path) -> None:
        file = base.path / "model.safetensors.index.json"
        index = json.loads(file.read_text())
        file.write_text(json.dumps(index | {"weight_map": change(index["weight_map"])}))

    return rewrite


def _truncate_a_shard(base: BaseModel, _: Path) -> None:
    os.truncate(base.weight_files[0], base.weight_files[0].stat().st_size - 1)


def _delete_a_shard(base: BaseModel, _: Path) -> None:
    base.weight_files[0].unlink()


def _truncate_the_adapter(_: BaseModel, adapter: Path) -> None:
    file = adapter / "adapter_model.safetensors"
    os.truncate(file, file.stat().st_size - 1)


def _no_index(base: BaseModel, _: Path) -> None:
    (base.path / "model.safetensors.index.json").write_text("{")


REFUSED: dict[str, tuple[Break, type[AdapterHubError], str]] = {
    "dora without magnitudes": (_config(use_dora=True), Unsupported, "use_dora"),
    "dora with lora_bias": (_config(use_dora=True, lora_bias=True), Unsupported, "lora_bias"),
    "trainable tokens that are not there": (_config(trainable_token_indices=[1]), Unsupported, "trainable tokens"),
    "pissa": (_config(init_lora_weights="pissa"), Unsupported, "pissa"),
    "olora": (_config(init_lora_weights="olora"), Unsupported, "olora"),
    "corda": (_config(init_lora_weights="corda"), Unsupported, "corda"),
    "loftq": (_config(init_lora_weights="loftq"), Unsupported, "loftq"),
    "alora": (_config(alora_invocation_tokens=[1, 2]), Unsupported, "aLoRA"),
    "layer replication": (_config(layer_replication=[[0, 2], [1, 2]]), Unsupported, "replication"),
    "a classifier": (_config(modules_to_save=["score"]), Unsupported, "score"),
    "quantised base": (_base_config(quantization_config={"quant_method": "gptq"}), Unsupported, "gptq"),
    "truncated adapter": (_truncate_the_adapter, AdapterError, "truncated"),
    "truncated shard": (_truncate_a_shard, StorageError, "truncated"),
    "missing shard": (_delete_a_shard, StorageError, "cannot be read"),
    "index is no JSON": (_no_index, StorageError, "not JSON"),
    "index names a missing file": (
        _index(lambda m: m | {"model.norm.weight": "gone.safetensors"}),
        StorageError,
        "gone",
    ),
    "index names a missing tensor": (_index(lambda m: m | {"extra": min(m.values())}), StorageError, "extra"),
    "index leaves the folder": (_index(lambda m: m | {"x": "../x.safetensors"}), StorageError, "own folder"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_refused(case: str, base_factory: Any, adapter_factory: Any, tmp_path: Path) -> None:
    breaks, error, told = REFUSED[case]
    base, adapter = base_factory(shards=2), adapter_factory()
    breaks(base, adapter)
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(error) as raised:
        plan_export(adapter, BaseModel(name="base", path=base.path), tmp_path / "out")
    assert told in str(raised.value)
    assert raised.value.exit_code == 2
    assert sorted(tmp_path.rglob("*")) == before


def test_a_module_that_the_base_lacks(base_factory: Any, adapter_factory: Any, rename: Any, tmp_path: Path) -> None:
    adapter = rename(adapter_factory(), "layers.1.mlp.up_proj", "layers.7.mlp.up_proj")
    with pytest.raises(BaseMismatch, match=r"no weight for model\.layers\.7"):
        plan_export(adapter, base_factory(), tmp_path / "out")


def test_two_factors_of_one_tensor(base_factory: Any, adapter_factory: Any, rename: Any, tmp_path: Path) -> None:
    adapter = rename(adapter_factory(), "layers.1.mlp.up_proj", "x.model.layers.0.mlp.up_proj", prefix="model.")
    with pytest.raises(BaseMismatch, match="would both change"):
        plan_export(adapter, base_factory(), tmp_path / "out")


def test_a_rank_of_zero(base_factory: Any, adapter_factory: Any, tmp_path: Path) -> None:
    adapter = adapter_factory()
    _config(rank_pattern={"q_proj": 0})(base_factory(), adapter)
    file = adapter / "adapter_model.safetensors"
    halves = {"lora_A": lambda factor: factor[:0], "lora_B": lambda factor: factor[:, :0]}
    factors = {
        name: halves[name.split(".")[-2]](factor) if "q_proj" in name else factor
        for name, factor in load_file(file).items()
    }
    save_file(factors, file)
    with pytest.raises(AdapterError, match="q_proj has rank 0"):
        plan_export(adapter, find_base(str(tmp_path / "base")), tmp_path / "out")


def test_another_shape(base_factory: Any, adapter_factory: Any, rename: Any, tmp_path: Path) -> None:
    adapter = rename(adapter_factory(targets=["up_proj"]), "mlp.up_proj", "mlp.down_proj")  # (128, 64) and (64, 128)
    with pytest.raises(BaseMismatch, match=r"is \[64, 128\] there, the adapter makes \[128, 64\]"):
        plan_export(adapter, base_factory(), tmp_path / "out")


def test_another_base_of_the_same_shape(base_factory: Any, adapter_factory: Any, tmp_path: Path) -> None:
    base, adapter = base_factory(), adapter_factory()
    other = replace(base.fingerprint, content="0" * 64, values="0" * 64, name="other/model")
    with pytest.raises(BaseMismatch) as raised:
        plan_export(adapter, base, tmp_path / "out", recorded=other)
    assert "other/model" in raised.value.hint


def test_the_same_base_in_another_dtype_is_noted(base_factory: Any, adapter_factory: Any, tmp_path: Path) -> None:
    recorded = base_factory("float").fingerprint
    plan = plan_export(adapter_factory(), base_factory("half", dtype="bfloat16"), tmp_path / "out", recorded=recorded)
    assert "BF16" in plan.note
    assert plan_export(adapter_factory(), base_factory("same"), tmp_path / "out", recorded=recorded).note == ""


def test_the_head_of_a_tied_base_becomes_a_tensor(base_factory: Any, adapter_factory: Any, tmp_path: Path) -> None:
    base = base_factory(tied=True)
    plan = plan_export(adapter_factory(targets=["lm_head"], base=_untied(base, tmp_path)), base, tmp_path / "out")
    assert [op.source.name for op in plan.merged] == ["lm_head.weight"]
    assert plan.config == {"tie_word_embeddings": False}


def test_a_tied_base_that_stores_its_head(base_factory: Any, adapter_factory: Any, tmp_path: Path) -> None:
    base = base_factory()
    _base_config(tie_word_embeddings=True)(base, Path())
    adapter = adapter_factory(targets=["lm_head", "q_proj"], base=_untied(base, tmp_path))
    with pytest.raises(Unsupported, match="tie_word_embeddings is set, but the head is stored"):
        plan_export(adapter, BaseModel(name="base", path=base.path), tmp_path / "out")


def test_a_target_that_exists(base_factory: Any, adapter_factory: Any, tmp_path: Path) -> None:
    base, adapter = base_factory(), adapter_factory()
    (tmp_path / "folder").mkdir()
    (tmp_path / "file").write_text("mine")
    (tmp_path / "link").symlink_to("nowhere")
    for name in ("folder", "file", "link"):
        with pytest.raises(AlreadyExists):
            plan_export(adapter, base, tmp_path / name)


@pytest.mark.parametrize("target", ["base/config.json/out", "a" * 300, "nul\0"])
def test_a_target_that_cannot_be(target: str, base_factory: Any, adapter_factory: Any, tmp_path: Path) -> None:
    with pytest.raises((StorageError, UsageError)):
        plan_export(adapter_factory(), base_factory(), tmp_path / target)


@pytest.mark.skipif(os.getuid() == 0, reason="root may write anywhere")
def test_a_folder_that_is_not_writable(base_factory: Any, adapter_factory: Any, tmp_path: Path) -> None:
    base, adapter = base_factory(), adapter_factory()
    (tmp_path / "readonly").mkdir(mode=0o500)
    with pytest.raises(StorageError, match="not writable"):
        plan_export(adapter, base, tmp_path / "readonly" / "out")


def test_more_than_the_disk_holds(base_factory: Any, adapter_factory: Any, tmp_path: Path) -> None:
    base = base_factory()
    size = os.statvfs(tmp_path).f_bavail * os.statvfs(tmp_path).f_frsize
    count = min(size, 2**43) // 2 + 2**24  # elements of bfloat16: just more than is free
    header = json.dumps(
        {"ballast.weight": {"dtype": "BF16", "shape": [count], "data_offsets": [0, 2 * count]}}
    ).encode()
    with (base.path / "model-2.safetensors").open("wb") as file:  # sparse: it takes no disk
        file.write(struct.pack("<Q", len(header)) + header)
        file.truncate(8 + len(header) + 2 * count)
    (base.path / "model.safetensors").rename(base.path / "model-1.safetensors")
    with pytest.raises(StorageError, match="not enough disk"):
        plan_export(adapter_factory(), find_base(str(base.path)), tmp_path / "out")


def test_an_unknown_dtype(base_factory: Any, adapter_factory: Any, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="int8"):
        plan_export(adapter_factory(), base_factory(), tmp_path / "out", dtype="int8")


@pytest.fixture
def rename() -> Callable[..., Path]:
    """Rename modules in an adapter's weights."""

    def change(adapter: Path, old: str, new: str, *, prefix: str = "") -> Path:
        file = adapter / "adapter_model.safetensors"
        save_file({k.replace(prefix + old, new): v for k, v in load_file(file).items()}, file)
        return adapter

    return change


def _untied(base: BaseModel, tmp_path: Path) -> Path:
    """A config beside which adapters with a head can be made."""
    (tmp_path / "untied").mkdir()
    (tmp_path / "untied" / "config.json").write_text(json.dumps(base.config | {"tie_word_embeddings": False}))
    return tmp_path / "untied"
