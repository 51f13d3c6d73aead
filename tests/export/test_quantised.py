"""Quantised bases: what they stand for is read as bitsandbytes and torch read it, and merged into that."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from adapterhub.base import find_base
from adapterhub.errors import BaseMismatch, StorageError, Unsupported
from adapterhub.export import export_model, plan_export
from adapterhub.export.packing import stored
from adapterhub.export.unpack import float8_values, unpack
from adapterhub.peftdir import read

Q = "model.layers.0.self_attn.q_proj.weight"
FLOAT8 = {"F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2}


@pytest.mark.parametrize("name", FLOAT8)
def test_every_float8_value(name: str) -> None:
    theirs = torch.arange(256, dtype=torch.uint8).view(FLOAT8[name]).float().numpy()
    np.testing.assert_array_equal(float8_values(name), theirs)


# ── bitsandbytes ─────────────────────────────────────────────────────────────────────────────────────────────


def write_four_bits(
    folder: Path, base: Path, *, kind: str = "nf4", double: bool = True, dtype: str = "bfloat16"
) -> None:
    """A base as transformers saves it with ``load_in_4bit``: all linear layers but the head."""
    import bitsandbytes.functional as bnb

    tensors = {}
    for name, tensor in load_file(base / "model.safetensors").items():
        weight = tensor.to(getattr(torch, dtype))
        if name.endswith("_proj.weight"):
            packed, state = bnb.quantize_4bit(weight, quant_type=kind, compress_statistics=double)
            tensors |= {f"{name}.{part}": value for part, value in state.as_dict(packed=True).items()}
            weight = packed
        tensors[name] = weight
    save_base(folder, base, tensors, {"quant_method": "bitsandbytes", "load_in_4bit": True}, dtype)


def write_int8(folder: Path, base: Path) -> None:
    import bitsandbytes.functional as bnb

    tensors = {}
    for name, tensor in load_file(base / "model.safetensors").items():
        weight = tensor.half()
        if name.endswith("_proj.weight"):
            weight, scale, _ = bnb.int8_vectorwise_quant(weight)
            tensors[name.replace(".weight", ".SCB")] = scale
            tensors[name.replace(".weight", ".weight_format")] = torch.tensor(0, dtype=torch.uint8)
        tensors[name] = weight
    save_base(folder, base, tensors, {"quant_method": "bitsandbytes", "load_in_8bit": True}, "float16")


def save_base(
    folder: Path, base: Path, tensors: dict[str, torch.Tensor], quantisation: dict[str, Any] | None, dtype: str
) -> None:
    folder.mkdir()
    config = json.loads((base / "config.json").read_text()) | {"dtype": dtype}
    config |= {"quantization_config": quantisation} if quantisation else {}
    (folder / "config.json").write_text(json.dumps(config))
    save_file({name: t.contiguous() for name, t in tensors.items()}, folder / "model.safetensors", {"format": "pt"})


@pytest.mark.parametrize("double", [True, False], ids=["double", "single"])
@pytest.mark.parametrize(("kind", "dtype"), [("nf4", "bfloat16"), ("nf4", "float16"), ("fp4", "float32")])
def test_four_bits_are_read_as_bitsandbytes_reads_them(
    kind: str, dtype: str, double: bool, tiny_base: Path, tmp_path: Path
) -> None:
    import bitsandbytes.functional as bnb

    write_four_bits(tmp_path / "base", tiny_base, kind=kind, double=double, dtype=dtype)
    weights = stored(find_base(str(tmp_path / "base")))
    files = load_file(tmp_path / "base" / "model.safetensors")
    assert weights.keys() == load_file(tiny_base / "model.safetensors").keys()
    for name, weight in weights.items():
        if weight.packing is None:
            continue
        parts = {k.removeprefix(f"{name}."): v for k, v in files.items() if k.startswith(f"{name}.")}
        state = bnb.QuantState.from_dict(parts, device=torch.device("cpu"))
        theirs = bnb.dequantize_4bit(files[name], state).float().numpy()
        ours = unpack(weight.file, weight.tensor, weight.packing, 0, theirs.shape[0])
        np.testing.assert_array_equal(ours, theirs)
        for first, last in ((0, 1), (3, 8), (theirs.shape[0] - 1, theirs.shape[0])):  # in blocks, the same
            part = unpack(weight.file, weight.tensor, weight.packing, first, last)
            np.testing.assert_array_equal(part, theirs[first:last])


def test_blocks_of_scales_that_cross_rows(tmp_path: Path) -> None:
    """Rows of 25 values do not end where scales or bytes end."""
    import bitsandbytes.functional as bnb

    matrix = torch.randn(31, 25, generator=torch.Generator().manual_seed(0))
    packed, state = bnb.quantize_4bit(matrix, quant_type="nf4", compress_statistics=True)
    parts = {f"{Q}.{part}": value for part, value in state.as_dict(packed=True).items()}
    (tmp_path / "base").mkdir()
    (tmp_path / "base" / "config.json").write_text('{"quantization_config": {"quant_method": "bitsandbytes"}}')
    save_file({Q: packed, **parts}, tmp_path / "base" / "model.safetensors")
    weight = stored(find_base(str(tmp_path / "base")))[Q]
    theirs = bnb.dequantize_4bit(packed, state).numpy()
    assert weight.packing is not None
    for first, last in ((0, 31), (1, 2), (7, 30), (30, 31)):
        ours = unpack(weight.file, weight.tensor, weight.packing, first, last)
        np.testing.assert_array_equal(ours, theirs[first:last])


@pytest.mark.parametrize("kind", ["nf4", "int8"])
def test_a_model_of_a_quantised_base(
    kind: str, tiny_base: Path, adapter_factory: Any, load_model: Any, tmp_path: Path
) -> None:
    import bitsandbytes.functional as bnb

    if kind == "nf4":
        write_four_bits(tmp_path / "base", tiny_base)
    else:
        write_int8(tmp_path / "base", tiny_base)
    adapter = adapter_factory(targets=["q_proj", "up_proj"], rank=4, alpha=8)

    result = export_model(adapter, find_base(str(tmp_path / "base")), tmp_path / "out", base_precision="dequantized")

    assert result.certificate is not None
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert "quantization_config" not in config
    assert json.loads((tmp_path / "out" / "export.json").read_text())["base_precision"] == "dequantized"
    merged, before = load_model(tmp_path / "out"), load_model(tmp_path / "base")
    assert merged.keys() == load_file(tiny_base / "model.safetensors").keys()
    factors = load_file(adapter / "adapter_model.safetensors")
    for name, found in merged.items():
        assert found.dtype == (torch.bfloat16 if kind == "nf4" else torch.float16)
        if kind == "nf4" and f"{name}.absmax" in before:
            parts = {k.removeprefix(f"{name}."): v for k, v in before.items() if k.startswith(f"{name}.")}
            old = bnb.dequantize_4bit(before[name], bnb.QuantState.from_dict(parts, device=torch.device("cpu")))
        elif before[name].dtype == torch.int8:
            old = bnb.int8_vectorwise_dequant(before[name], before[name.replace(".weight", ".SCB")])
        else:
            old = before[name]
        key = f"base_model.model.{name.removesuffix('.weight')}"
        if f"{key}.lora_A.weight" in factors:
            old = old.float() + 2 * factors[f"{key}.lora_B.weight"] @ factors[f"{key}.lora_A.weight"]
        torch.testing.assert_close(found, old.to(found.dtype), rtol=2**-7, atol=1e-6)


@pytest.mark.slow
@pytest.mark.parametrize("bits", [4, 8])
def test_what_transformers_saves_quantised(bits: int, tiny_base: Path, adapter_factory: Any, tmp_path: Path) -> None:
    """Logits of the export against PEFT on the dequantised model, both in float32."""
    from peft import PeftModel
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    options = {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": True}
    settings = BitsAndBytesConfig(**(options if bits == 4 else {"load_in_8bit": True}))
    quantised = AutoModelForCausalLM.from_pretrained(tiny_base, dtype=torch.float32, quantization_config=settings)
    quantised.save_pretrained(tmp_path / "base")
    adapter = adapter_factory(rank=4, alpha=8)
    found = find_base(str(tmp_path / "base"))
    export_model(adapter, found, tmp_path / "out", base_precision="dequantized", dtype="float32")

    tokens = torch.arange(1, 49).view(2, 24)
    with torch.no_grad():
        ours = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32).eval()(tokens).logits
        plain = quantised.dequantize(dtype=torch.float32)
        theirs = PeftModel.from_pretrained(plain, adapter).eval()(tokens).logits
    assert float((ours - theirs).abs().max()) <= 1e-5


# ── float8 ───────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("shape", ["plain", "tensor", "row", "block", "compressed-tensors"])
@pytest.mark.parametrize("dtype", [None, "float32"])
def test_float8(shape: str, dtype: str | None, tiny_base: Path, adapter_factory: Any, tmp_path: Path) -> None:
    tensors, values = {}, {}
    end = "weight_scale" if shape in {"compressed-tensors", "row"} else "weight_scale_inv"
    for name, tensor in load_file(tiny_base / "model.safetensors").items():
        tensors[name] = values[name] = tensor.bfloat16()
        if name.endswith("_proj.weight"):
            rows, columns = tensor.shape
            tensors[name] = (tensor * 8).to(torch.float8_e4m3fn)
            values[name] = tensors[name].float()
            if shape == "plain":
                continue
            count = {"row": (rows, 1), "block": (-(-rows // 48), -(-columns // 32))}.get(shape, ())
            scale = torch.rand(count, generator=torch.Generator().manual_seed(1)) + 0.5
            tensors[name.replace("weight", end)] = scale
            tensors[name.replace("weight", "input_scale")] = torch.tensor(1.0)
            wide = scale.repeat_interleave(48, 0)[:rows] if shape == "block" else scale
            values[name] = values[name] * (wide.repeat_interleave(32, 1)[:, :columns] if shape == "block" else wide)
    method = {"quant_method": "fp8", "weight_block_size": [48, 32]}
    if shape == "compressed-tensors":
        method = {"quant_method": shape, "format": "float-quantized"}
    elif shape == "row":
        method = {"quant_method": "compressed-tensors", "format": "float-quantized"}
    save_base(tmp_path / "base", tiny_base, tensors, None if shape == "plain" else method, "bfloat16")
    adapter = adapter_factory(targets=["q_proj"], rank=4, alpha=8)

    export_model(adapter, find_base(str(tmp_path / "base")), tmp_path / "out", dtype=dtype)

    factors, out = load_file(adapter / "adapter_model.safetensors"), load_file(tmp_path / "out" / "model.safetensors")
    assert out.keys() == values.keys()
    wanted = torch.float32 if dtype else torch.bfloat16
    for name, value in values.items():
        key = f"base_model.model.{name.removesuffix('.weight')}"
        if f"{key}.lora_A.weight" in factors:
            value = value + 2 * factors[f"{key}.lora_B.weight"] @ factors[f"{key}.lora_A.weight"]
        assert out[name].dtype == wanted
        torch.testing.assert_close(out[name], value.to(wanted), rtol=2**-7 if dtype is None else 1e-6, atol=1e-6)


def test_an_adapter_of_a_quantised_base_can_be_published(tiny_base: Path, adapter_factory: Any, tmp_path: Path) -> None:
    write_four_bits(tmp_path / "base", tiny_base)
    base = find_base(str(tmp_path / "base"))
    base.check_factors(read(adapter_factory()))
    half = adapter_factory("half")
    factors = load_file(half / "adapter_model.safetensors")
    save_file(
        {k: v[:, :32].contiguous() if "lora_A" in k else v for k, v in factors.items()},
        half / "adapter_model.safetensors",
    )
    with pytest.raises(BaseMismatch, match="the adapter makes"):
        base.check_factors(read(half))


# ── refusals ─────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    ("precision", "told"), [(None, "--base-precision dequantized"), ("original", "before quantisation")]
)
def test_a_quantised_base_asks_what_is_meant(
    precision: str | None, told: str, tiny_base: Path, adapter_factory: Any, tmp_path: Path
) -> None:
    write_four_bits(tmp_path / "base", tiny_base)
    with pytest.raises(Unsupported) as raised:
        plan_export(adapter_factory(), find_base(str(tmp_path / "base")), tmp_path / "out", base_precision=precision)
    assert told in f"{raised.value} {raised.value.hint}"


def test_dequantized_needs_a_quantised_base(base_factory: Any, adapter_factory: Any, tmp_path: Path) -> None:
    with pytest.raises(Unsupported, match="not quantised"):
        plan_export(adapter_factory(), base_factory(), tmp_path / "out", base_precision="dequantized")


@pytest.mark.parametrize("method", ["gptq", "awq", "mxfp4", "compressed-tensors"])
def test_other_quantisations_are_refused(method: str, base_factory: Any, adapter_factory: Any, tmp_path: Path) -> None:
    base = base_factory()
    config = json.loads((base.path / "config.json").read_text())
    quantisation = {"quant_method": method, "format": "pack-quantized"}
    (base.path / "config.json").write_text(json.dumps(config | {"quantization_config": quantisation}))
    with pytest.raises(Unsupported, match=method):
        plan_export(adapter_factory(), find_base(str(base.path)), tmp_path / "out", base_precision="dequantized")


@pytest.mark.parametrize("lost", ["absmax", "quant_map", "nested_absmax"])
def test_a_part_that_is_missing(lost: str, tiny_base: Path, adapter_factory: Any, tmp_path: Path) -> None:
    write_four_bits(tmp_path / "base", tiny_base)
    file = tmp_path / "base" / "model.safetensors"
    tensors = load_file(file)
    del tensors[f"{Q}.{lost}"]
    save_file(tensors, file)
    with pytest.raises(StorageError, match=f"{Q}.{lost}"):
        base = find_base(str(tmp_path / "base"))
        plan_export(adapter_factory(), base, tmp_path / "out", base_precision="dequantized")


def test_lora_bias_of_a_quantised_layer_is_scaled(tiny_base: Path, adapter_factory: Any, tmp_path: Path) -> None:
    """PEFT's merge into a quantised layer leaves the scale out of the bias."""
    write_int8(tmp_path / "base", tiny_base)
    bias = "model.layers.0.self_attn.q_proj.bias"
    weights = load_file(tmp_path / "base" / "model.safetensors")
    save_file(weights | {bias: torch.ones(64)}, tmp_path / "base" / "model.safetensors")
    adapter = adapter_factory(rank=2, alpha=6, targets=["q_proj"], config={"lora_bias": True})
    file = adapter / "adapter_model.safetensors"
    save_file(
        load_file(file) | {f"base_model.model.{bias.removesuffix('.bias')}.lora_B.bias": torch.full((64,), 0.5)}, file
    )

    base = find_base(str(tmp_path / "base"))
    export_model(adapter, base, tmp_path / "out", base_precision="dequantized", dtype="float32")

    assert torch.equal(load_file(tmp_path / "out" / "model.safetensors")[bias], torch.full((64,), 1 + 6 / 2 * 0.5))
