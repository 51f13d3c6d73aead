from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from adapterhub import peftdir
from adapterhub.base import find_base
from adapterhub.errors import AdapterHubError, BaseMismatch, NotFound

Factory = Callable[..., Path]


@pytest.fixture
def copy_of(tiny_base: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(tiny_base, tmp_path / "copy"))


def change(base: Path, name: str, change: Callable[[np.ndarray], np.ndarray]) -> None:  # type: ignore[type-arg]
    tensors = load_file(base / "model.safetensors")
    tensors[name] = np.ascontiguousarray(change(tensors[name]))
    save_file(tensors, base / "model.safetensors", metadata={"format": "pt"})


def test_a_copy_is_the_same_base(tiny_base: Path, copy_of: Path) -> None:
    original = find_base(str(tiny_base)).fingerprint
    assert original.match(find_base(str(copy_of)).fingerprint) == "exact"
    assert original.dtype == "F32"
    assert original.parameters == sum(v.size for v in load_file(tiny_base / "model.safetensors").values())
    assert find_base(str(copy_of)).check(original, what="x") == ""


def test_shards_do_not_change_a_base(tiny_base: Path, copy_of: Path) -> None:
    tensors = load_file(copy_of / "model.safetensors")
    (copy_of / "model.safetensors").unlink()
    names = sorted(tensors)
    shards = {"model-1.safetensors": names[::2], "model-2.safetensors": names[1::2]}
    for file, held in shards.items():
        save_file({name: tensors[name] for name in held}, copy_of / file)
    index = {"weight_map": {name: file for file, held in shards.items() for name in held}}
    (copy_of / "model.safetensors.index.json").write_text(json.dumps(index))
    assert find_base(str(tiny_base)).fingerprint.match(find_base(str(copy_of)).fingerprint) == "exact"


def test_one_other_number_is_another_base(tiny_base: Path, copy_of: Path) -> None:
    def nudge(weights: np.ndarray) -> np.ndarray:  # type: ignore[type-arg]
        weights = weights.copy()
        weights[0, 0] += 1
        return weights

    change(copy_of, "model.layers.1.mlp.up_proj.weight", nudge)
    recorded = find_base(str(tiny_base)).fingerprint
    with pytest.raises(BaseMismatch) as refused:
        find_base(str(copy_of)).check(recorded, what="acme/support@1")
    assert "acme/support@1" in refused.value.what
    assert refused.value.hint == f"use --base {recorded.name}"


def test_another_dtype_is_the_same_base_with_a_note(copy_of: Path) -> None:
    tensors = load_file(copy_of / "model.safetensors")
    exact = {k: np.round(v * 64) / 64 for k, v in tensors.items()}  # the same numbers in both dtypes
    save_file(exact, copy_of / "model.safetensors")
    original = find_base(str(copy_of)).fingerprint
    save_file({k: v.astype(np.float16) for k, v in exact.items()}, copy_of / "model.safetensors")
    other = find_base(str(copy_of))
    assert original.match(other.fingerprint) == "dtype"
    assert "F16" in other.check(original, what="x")


def test_an_adapter_must_fit_the_bases_modules(adapter_factory: Factory, tiny_base: Path) -> None:
    base = find_base(str(tiny_base))
    base.check_factors(peftdir.read(adapter_factory("fits")))
    foreign = adapter_factory("foreign")
    tensors = load_file(foreign / peftdir.WEIGHTS)
    save_file({k.replace("layers.1", "layers.7"): v for k, v in tensors.items()}, foreign / peftdir.WEIGHTS)
    with pytest.raises(BaseMismatch, match=r"layers\.7"):
        base.check_factors(peftdir.read(foreign))
    save_file({k: v[:, :32].copy() if "lora_A" in k else v for k, v in tensors.items()}, foreign / peftdir.WEIGHTS)
    with pytest.raises(BaseMismatch, match="the adapter makes"):
        base.check_factors(peftdir.read(foreign))


@pytest.mark.parametrize(
    ("config", "stored", "shape", "module"),
    [
        ({"model_type": "gpt2"}, "h.0.attn.c_attn.weight", (8, 24), "transformer.h.0.attn.c_attn"),
        ({"model_type": "gpt_neox"}, "embed_out.weight", (24, 8), "lm_head"),
        ({"model_type": "llama", "tie_word_embeddings": True}, "model.embed_tokens.weight", (24, 8), "lm_head"),
        ({"model_type": "mixtral"}, "model.layers.0.block_sparse_moe.gate.weight", (24, 8), "model.layers.0.mlp.gate"),
        (
            {"model_type": "mixtral"},
            "model.layers.0.block_sparse_moe.experts.0.w1.weight",
            (12, 8),
            "model.layers.0.mlp.experts.base_layer",
        ),
        ({"model_type": "gpt_oss"}, "model.layers.0.mlp.experts.down_proj", (3, 8, 24), "model.layers.0.mlp.experts"),
        ({"model_type": "not_in_the_table"}, "a.b.weight", (24, 8), "a.b"),
    ],
)
def test_modules_are_found_by_the_names_of_a_checkpoint(
    config: dict[str, object], stored: str, shape: tuple[int, ...], module: str, tmp_path: Path
) -> None:
    """What can be exported can be published: an adapter names modules as they are in memory."""
    base, adapter = tmp_path / "base", tmp_path / "adapter"
    base.mkdir()
    adapter.mkdir()
    (base / "config.json").write_text(json.dumps(config))
    save_file({stored: np.zeros(shape, "f4")}, base / "model.safetensors")
    (adapter / peftdir.CONFIG).write_text(json.dumps({"peft_type": "LORA", "r": 2}))
    for name in (module, f"{module}.7"):
        key = f"base_model.model.{name}"
        factors = {f"{key}.lora_A.weight": np.zeros((2, 8), "f4"), f"{key}.lora_B.weight": np.zeros((24, 2), "f4")}
        save_file(factors, adapter / peftdir.WEIGHTS)
        if name == module:
            find_base(str(base)).check_factors(peftdir.read(adapter))
    with pytest.raises(BaseMismatch, match="no weight for"):
        find_base(str(base)).check_factors(peftdir.read(adapter))


@pytest.mark.parametrize("name", ["nowhere", "", "/nowhere/at/all", "../x", "a b/c"])
def test_a_base_that_is_not_there_is_not_found(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(NotFound):
        find_base(name)


def test_a_folder_without_a_model_is_no_base(copy_of: Path) -> None:
    (copy_of / "model.safetensors").unlink()
    with pytest.raises(NotFound):
        find_base(str(copy_of))


def test_truncated_weights_are_said(copy_of: Path) -> None:
    data = (copy_of / "model.safetensors").read_bytes()
    (copy_of / "model.safetensors").write_bytes(data[:-100])
    with pytest.raises(AdapterHubError, match="truncated"):
        _ = find_base(str(copy_of)).fingerprint
