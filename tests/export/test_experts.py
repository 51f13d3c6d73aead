"""LoRA on fused experts answers after the export as PEFT does, whether or not the checkpoint keeps them apart."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.torch as torch_file
import torch
from lora_configurations import KINDS, Configuration, compare
from safetensors.numpy import load_file, save_file

from adapterhub.base import find_base
from adapterhub.errors import AdapterHubError, BaseMismatch, Unsupported
from adapterhub.export import export_model, plan_export

FUSED = ("mixtral", "qwen2_moe", "qwen3_moe", "gpt_oss", "granitemoe")


@pytest.mark.slow
@pytest.mark.parametrize("kind", FUSED)
def test_logits(kind: str, tmp_path: Path) -> None:
    lora = {"r": 3, "target_modules": ["q_proj"], "target_parameters": list(KINDS[kind].parameters)}
    patterns = {"rank_pattern": {".*gate_up_proj": 2}, "alpha_pattern": {"down_proj": 5}, "use_rslora": True}
    outcome = compare(Configuration(kind, lora | patterns), tmp_path)
    assert outcome is not None
    assert not outcome.refused
    assert outcome.error <= 1e-5
    assert outcome.change > 1e-3


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["mixtral", "gpt_oss"])
@pytest.mark.parametrize("parameter", ["gate_up_proj", "down_proj"])
def test_one_parameter(parameter: str, kind: str, tmp_path: Path) -> None:
    """Its factors have the same name, whichever it is."""
    lora = {"r": 2, "target_modules": [], "target_parameters": [parameter]}
    outcome = compare(Configuration(kind, lora, dtype="bfloat16", max_shard_size=20_000), tmp_path)
    assert outcome is not None
    assert not outcome.refused
    assert outcome.error <= 1e-5
    assert outcome.change > 1e-3


# ── by hand: a layer of three experts, (4, 6) each ───────────────────────────────────────────────────────────────

EXPERTS, OUT, IN, RANK = 3, 4, 6, 2
MODULE = "model.layers.0.mlp.experts"


@pytest.fixture
def layer(tmp_path: Path) -> tuple[Path, Path]:
    """A base of the kind of Qwen3-MoE, and an adapter on its down projections."""
    chance = np.random.default_rng(0)
    stack = chance.standard_normal((EXPERTS, OUT, IN), "f4")
    weights = {f"{MODULE}.{i}.down_proj.weight": stack[i] for i in range(EXPERTS)}
    factors = {
        f"base_model.model.{MODULE}.lora_A.weight": chance.standard_normal((EXPERTS * RANK, IN), "f4"),
        f"base_model.model.{MODULE}.lora_B.weight": chance.standard_normal((OUT, EXPERTS * RANK), "f4"),
    }
    write(tmp_path / "base", "model.safetensors", weights, "config.json", {"model_type": "qwen3_moe"})
    config = {"peft_type": "LORA", "r": RANK, "lora_alpha": 6, "peft_version": "0.21.2"}
    config |= {"target_parameters": ["experts.down_proj"]}
    write(tmp_path / "adapter", "adapter_model.safetensors", factors, "adapter_config.json", config)
    return tmp_path / "base", tmp_path / "adapter"


def write(folder: Path, name: str, tensors: dict[str, Any], config_name: str, config: dict[str, Any]) -> None:
    folder.mkdir(exist_ok=True)
    save_file({key: np.ascontiguousarray(value) for key, value in tensors.items()}, folder / name)
    (folder / config_name).write_text(json.dumps(config))


def expected(base: Path, adapter: Path) -> np.ndarray:
    """W + s·B·A of each expert, as PEFT's `ParamWrapper.get_delta_weight` writes it: ``o r e, e r i -> e o i``."""
    a, b = (
        load_file(adapter / "adapter_model.safetensors")[f"base_model.model.{MODULE}.lora_{x}.weight"] for x in "AB"
    )
    delta = np.einsum("ore,eri->eoi", b.reshape(OUT, -1, EXPERTS), a.reshape(EXPERTS, -1, IN))
    weights = load_file(base / "model.safetensors")
    return np.stack([weights[f"{MODULE}.{i}.down_proj.weight"] for i in range(EXPERTS)]) + 6 / RANK * delta


def test_each_expert_takes_its_share(layer: tuple[Path, Path], tmp_path: Path) -> None:
    base, adapter = layer
    result = export_model(adapter, find_base(str(base)), tmp_path / "out")
    merged = load_file(tmp_path / "out" / "model.safetensors")
    found = np.stack([merged[f"{MODULE}.{i}.down_proj.weight"] for i in range(EXPERTS)])
    np.testing.assert_allclose(found, expected(base, adapter), atol=1e-5)
    assert result.merged == EXPERTS


def test_a_stack_of_experts(layer: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As some save it, and in blocks that do not end with an expert."""
    base, adapter = layer
    wanted = expected(base, adapter)
    stack = np.stack([tensor for _, tensor in sorted(load_file(base / "model.safetensors").items())])
    save_file({f"{MODULE}.down_proj": stack}, base / "model.safetensors")
    monkeypatch.setattr("adapterhub.export.layout.blocks.__kwdefaults__", {"cloned": False, "size": 3 * IN})
    result = export_model(adapter, find_base(str(base)), tmp_path / "out")
    np.testing.assert_allclose(
        load_file(tmp_path / "out" / "model.safetensors")[f"{MODULE}.down_proj"], wanted, atol=1e-5
    )
    assert result.certificate is not None
    assert result.certificate.sampled >= EXPERTS * IN  # rows of each expert


def test_experts_of_a_float8_base(layer: tuple[Path, Path], tmp_path: Path) -> None:
    """Each is unpacked, and then takes its share."""
    base, adapter = layer
    codes = np.full((OUT, IN), 0x38, "u1")  # 1.0 in F8_E4M3
    stored = {
        f"{MODULE}.{i}.down_proj.weight": torch.from_numpy(codes.copy()).view(torch.float8_e4m3fn)
        for i in range(EXPERTS)
    }
    scales = {f"{name}_scale_inv": torch.tensor(0.5 + i) for i, name in enumerate(stored)}
    torch_file.save_file(stored | scales, base / "model.safetensors")
    config = {"model_type": "qwen3_moe", "quantization_config": {"quant_method": "fp8"}}
    (base / "config.json").write_text(json.dumps(config))
    export_model(adapter, find_base(str(base)), tmp_path / "out", dtype="float32")

    merged = load_file(tmp_path / "out" / "model.safetensors")
    unpacked = {f"{MODULE}.{i}.down_proj.weight": np.full((OUT, IN), 0.5 + i, "f4") for i in range(EXPERTS)}
    save_file(unpacked, base / "model.safetensors")
    found = np.stack([merged[f"{MODULE}.{i}.down_proj.weight"] for i in range(EXPERTS)])
    np.testing.assert_allclose(found, expected(base, adapter), atol=1e-5)


def _config(**changes: Any) -> Any:
    def change(_: Path, adapter: Path) -> None:
        file = adapter / "adapter_config.json"
        file.write_text(json.dumps(json.loads(file.read_text()) | changes))

    return change


def _swap(_: Path, adapter: Path) -> None:
    """As PEFT 0.18 has it: A for the rows, B for the columns."""
    _factors(adapter, (EXPERTS * RANK, OUT), (IN, EXPERTS * RANK))


def _square(base: Path, adapter: Path) -> None:
    weights = {f"{MODULE}.{i}.down_proj.weight": np.zeros((IN, IN), "f4") for i in range(EXPERTS)}
    save_file(weights, base / "model.safetensors")
    _factors(adapter, (EXPERTS * RANK, IN), (IN, EXPERTS * RANK))
    _config(peft_version="0.18.0")(base, adapter)


def _rows_left_over(_: Path, adapter: Path) -> None:
    _factors(adapter, (EXPERTS * RANK + 1, IN), (OUT, EXPERTS * RANK + 1))


def _factors(adapter: Path, a: tuple[int, int], b: tuple[int, int]) -> None:
    name = f"base_model.model.{MODULE}.lora_"
    save_file(
        {f"{name}A.weight": np.ones(a, "f4"), f"{name}B.weight": np.ones(b, "f4")},
        adapter / "adapter_model.safetensors",
    )


def _lose(expert: int) -> Any:
    def change(base: Path, _: Path) -> None:
        weights = load_file(base / "model.safetensors")
        del weights[f"{MODULE}.{expert}.down_proj.weight"]
        save_file(weights, base / "model.safetensors")

    return change


def _another_rank(base: Path, adapter: Path) -> None:
    """Six rows of A would do for two experts of rank three."""
    _lose(2)(base, adapter)


REFUSED: dict[str, tuple[Any, type[AdapterHubError], str]] = {
    "no parameter named": (_config(target_parameters=None), Unsupported, "does not say of which parameter"),
    "another parameter named": (
        _config(target_parameters=["experts.gate_up_proj"]),
        BaseMismatch,
        "no gate_up_proj for",
    ),
    "sides of an old PEFT": (_swap, Unsupported, "PEFT before 0.19"),
    "square, of an old PEFT": (_square, Unsupported, "PEFT before 0.19"),
    "rows left over": (_rows_left_over, Unsupported, "7 rows of A"),
    "all experts are missing": (_lose(0), BaseMismatch, "no down_proj for"),
    "an expert is missing": (_lose(1), Unsupported, "1 experts of rank 2, and 6 rows of A"),
    "one is missing, and it would fit": (_another_rank, Unsupported, "2 experts of rank 2, and 6 rows of A"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_refused(case: str, layer: tuple[Path, Path], tmp_path: Path) -> None:
    breaks, error, told = REFUSED[case]
    base, adapter = layer
    breaks(base, adapter)
    with pytest.raises(error, match=told):
        plan_export(adapter, find_base(str(base)), tmp_path / "out")
    assert not (tmp_path / "out").exists()
