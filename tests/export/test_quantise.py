"""Quantised exports: what compressed-tensors reads in them is the plain export, each weight by its nearest code."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from adapterhub.base import BaseModel
from adapterhub.errors import IntegrityError, Unsupported, UsageError
from adapterhub.export import export_model, plan_export, verify
from adapterhub.export.certificate import certify
from adapterhub.export.dequantise import fit
from adapterhub.export.floats import widen
from adapterhub.export.layout import DTYPES, Operation, Rows
from adapterhub.export.quantise import quantise
from adapterhub.export.schemes import GROUPS, SCHEMES, find_scheme
from adapterhub.peftdir import Tensor, read_header

UP = "model.layers.0.mlp.up_proj"
OPTIONS: dict[str, dict[str, Any]] = {
    "w8a8": {"quantize": "w8a8"},
    "w8a16": {"quantize": "w8a16"},
    "w4a16": {"quantize": "w4a16", "group_size": 32},
    "fp8": {"quantize": "fp8"},
}
LARGEST_ERROR = {"w8a8": 0.01, "w8a16": 0.01, "w4a16": 0.12, "fp8": 0.03}  # relative, of random normal weights


def modules(folder: Path) -> dict[str, dict[str, torch.Tensor]]:
    """Module → its tensors by their last name, of a whole model."""
    found: dict[str, dict[str, torch.Tensor]] = {}
    for file in folder.glob("*.safetensors"):
        for name, tensor in load_file(file).items():
            module, _, parameter = name.rpartition(".")
            found.setdefault(module, {})[parameter] = tensor
    return found


def read_scheme(folder: Path) -> tuple[Any, Any]:
    """What compressed-tensors makes of the config: its compressor, and the scheme of the linear layers."""
    from compressed_tensors.compressors import BaseCompressor
    from compressed_tensors.quantization import QuantizationConfig

    told = json.loads((folder / "config.json").read_text())["quantization_config"]
    scheme = QuantizationConfig.model_validate(told).config_groups["group_0"]
    return BaseCompressor.get_value_from_registry(told["format"]), scheme


@pytest.mark.slow
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", OPTIONS)
def test_compressed_tensors_reads_the_plain_export(
    name: str, dtype: str, base_factory: Any, adapter_factory: Any, tmp_path: Path
) -> None:
    base, adapter = base_factory(dtype="bfloat16"), adapter_factory(config={"use_rslora": True})
    export_model(adapter, base, tmp_path / "plain", dtype=dtype, certificate=False)
    result = export_model(adapter, base, tmp_path / "out", dtype=dtype, **OPTIONS[name])
    compressor, scheme = read_scheme(tmp_path / "out")
    plain, quantised = modules(tmp_path / "plain"), modules(tmp_path / "out")
    assert plain.keys() == quantised.keys()
    count, lost, whole = 0, 0.0, 0.0
    for module, parts in quantised.items():
        weight = plain[module]["weight"]
        if not module.endswith("_proj"):
            assert torch.equal(parts["weight"], weight)
            continue
        assert parts.keys() == set(compressor.compression_param_names(scheme))
        assert parts["weight_scale"].dtype == weight.dtype
        theirs = compressor.compress({"weight": weight, "weight_scale": parts["weight_scale"]}, scheme)
        codes = "weight_packed" if "weight_packed" in parts else "weight"
        # in a 16-bit dtype compressed-tensors divides in it, and rounds the quotient before it chooses a code
        wide = {"weight_scale": parts["weight_scale"].float()}
        exact = compressor.compress({"weight": weight.float(), **wide}, scheme)
        assert torch.equal(parts[codes], exact[codes])
        assert all(
            parts[part].shape == theirs[part].shape and parts[part].dtype == theirs[part].dtype for part in parts
        )
        back = compressor.decompress(parts | wide, scheme)["weight"]
        lost += float((back.double() - weight.double()).norm() ** 2)
        whole += float(weight.double().norm() ** 2)
        count += 1
    assert count == 14
    assert result.certificate is not None
    assert (len(result.certificate.quantised), result.certificate.applied) == (14, 14)
    assert result.certificate.error == pytest.approx((lost / whole) ** 0.5, rel=1e-3)
    assert 0 < result.certificate.error < LARGEST_ERROR[name]
    assert verify(tmp_path / "out")["quantised"]["relative_error"] == round(result.certificate.error, 6)


@pytest.mark.slow
@pytest.mark.parametrize("name", OPTIONS)
@pytest.mark.filterwarnings("ignore:You passed `quantization_config`")
def test_transformers_answers_with_the_dequantised_weights(
    name: str, base_factory: Any, adapter_factory: Any, tmp_path: Path
) -> None:
    from transformers import AutoModelForCausalLM, CompressedTensorsConfig

    base, adapter = base_factory(tied=True), adapter_factory()
    export_model(adapter, base, tmp_path / "plain")
    export_model(adapter, base, tmp_path / "out", max_shard_size=40_000, **OPTIONS[name])
    compressor, scheme = read_scheme(tmp_path / "out")
    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "plain", dtype=torch.float32)
    for module, parts in modules(tmp_path / "out").items():
        if "weight_scale" in parts:
            plain.get_submodule(module).weight.data = compressor.decompress(parts, scheme)["weight"]
    settings = CompressedTensorsConfig(dequantize=True)
    options: dict[str, Any] = {"dtype": torch.float32, "quantization_config": settings}
    back = AutoModelForCausalLM.from_pretrained(tmp_path / "out", **options)
    for module in back.modules():
        if getattr(module, "quantization_scheme", None):
            module.quantization_enabled = False  # of the activations
    tokens = torch.arange(4, 68).view(2, 32)
    with torch.no_grad():
        assert torch.allclose(plain(tokens).logits, back(tokens).logits, atol=1e-4)


def test_what_is_quantised_and_what_stays(base_factory: Any, adapter_factory: Any, ah: Any, tmp_path: Path) -> None:
    base, adapter = base_factory(dtype="bfloat16", shards=3), adapter_factory(targets=["q_proj"])
    words = ("export", adapter, "--base", base.path, "--to", tmp_path / "out", "--quantize", "W4A16")
    planned = ah(*words, "--group-size", "64", "--plan", "--json")
    assert planned.code == 0, planned.err
    ran = ah(*words, "--group-size", "64", "--json")
    assert ran.code == 0, ran.err
    told, found = json.loads(ran.out), json.loads(planned.out)
    files = sorted((tmp_path / "out").glob("*.safetensors"))
    assert found["bytes_written"] == told["bytes_written"] == sum(file.stat().st_size for file in files)
    assert found["tensors"] == {"merged": 2, "quantised": 14, "saved": 0, "cast": 0, "kept": 7}
    assert (found["quantize"], found["group_size"]) == ("w4a16", 64)
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["quantization_config"]["ignore"] == ["lm_head"]
    assert config["quantization_config"]["config_groups"]["group_0"]["weights"]["group_size"] == 64
    index = json.loads((tmp_path / "out" / "model.safetensors.index.json").read_text())
    stored = {tensor.name: file.name for file in files for tensor in read_header(file)}
    assert index["weight_map"] == stored
    assert index["metadata"]["total_size"] == sum(t.end - t.start for f in files for t in read_header(f))
    assert "w4a16 in groups of 64" in (tmp_path / "out" / "README.md").read_text()
    assert told["certificate"]["quantised"]["tensors"] == 14
    for file in files:  # readers view a tensor where it lies: each must start at a multiple of its width
        for tensor in read_header(file):
            width = {"I64": 8, "I32": 4, "F32": 4}.get(tensor.dtype, 2)
            assert tensor.start % width == 0


def test_people_are_told(base_factory: Any, adapter_factory: Any, ah: Any, tmp_path: Path) -> None:
    words = ("export", adapter_factory(), "--base", base_factory().path, "--to", tmp_path / "out", "--quantize", "fp8")
    assert "linear layers fp8" in ah(*words, "--plan").out
    ran = ah(*words)
    assert ran.code == 0, ran.err
    assert "quantised 14 tensors" in ran.err
    assert "%" in ran.err
    assert ah("verify", tmp_path / "out").code == 0


@settings(deadline=None)
@given(
    name=st.sampled_from(sorted(SCHEMES)),
    group=st.sampled_from(GROUPS),
    dtype=st.sampled_from(sorted(DTYPES.values())),
    rows=st.integers(1, 5),
    times=st.integers(1, 3),
    odd=st.integers(0, 9),
    seed=st.integers(0, 2**32 - 1),
    size=st.sampled_from([1e-6, 1e-2, 1.0, 1e3]),
)
def test_every_code_is_the_nearest(
    name: str, group: int, dtype: str, rows: int, times: int, odd: int, seed: int, size: float
) -> None:
    """Rows of any size, of zeros, of one large value; rows that do not fill an int32."""
    scheme = find_scheme(name, group if name == "w4a16" else None)
    columns = group * times + (0 if scheme.group else odd)
    values = torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed)) * size
    values[0] = 0
    values[-1, columns // 2] *= 50
    number = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}[dtype]
    stored = values.clamp(-60000, 60000).to(number)
    tensor = Tensor("model.layers.0.mlp.up_proj.weight", dtype, (rows, columns), 0, stored.nbytes)
    operation = Operation(tensor, Path("f"), "f", dtype, scheme=scheme)
    raw = memoryview(bytearray(stored.view(torch.uint8).numpy().tobytes()))
    codes, scales = quantise(Rows(operation, 0, rows, columns), scheme, raw)
    assert len(codes) == operation.parts[0].size
    assert len(scales) == operation.parts[1].size
    truth = stored.double().numpy()
    wide = widen(scales, dtype).reshape(rows, -1)
    found = fit(
        scheme,
        np.frombuffer(codes, np.uint8).reshape(rows, -1),
        wide,
        truth=truth,
        rounding=np.zeros_like(truth),
        dtype=dtype,
    )
    assert found.right, found


@pytest.mark.parametrize("name", OPTIONS)
@pytest.mark.parametrize("what", ["code", "scale", "adapter"])
def test_the_certificate_sees_a_wrong_model(
    name: str, what: str, base_factory: Any, adapter_factory: Any, tmp_path: Path
) -> None:
    base, adapter = base_factory(dtype="bfloat16"), adapter_factory(scale=0.01)
    zero = adapter_factory("zero", scale=0.0)
    made = zero if what == "adapter" else adapter
    export_model(made, base, tmp_path / "out", certificate=False, **OPTIONS[name])
    plan = plan_export(adapter, base, tmp_path / "other", **OPTIONS[name])
    file = tmp_path / "out" / "model.safetensors"
    if what != "adapter":
        end = "weight_scale" if what == "scale" else ("weight_packed" if name in {"w8a16", "w4a16"} else "weight")
        tensor = next(t for t in read_header(file) if t.name == f"{UP}.{end}")
        with file.open("r+b") as stream:
            stream.seek(tensor.start + 1)
            old = stream.read(1)[0]
            stream.seek(tensor.start + 1)
            stream.write(bytes([old ^ 0x70]))
    with pytest.raises(IntegrityError, match="quantised"):
        certify(plan, tmp_path / "out")


@pytest.mark.parametrize("name", OPTIONS)
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_what_is_no_number_is_not_quantised(
    name: str, value: float, base_factory: Any, adapter_factory: Any, tmp_path: Path
) -> None:
    base = base_factory()
    tensors = load_file(base.path / "model.safetensors")
    tensors[f"{UP}.weight"][3, 5] = value
    save_file(tensors, base.path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(Unsupported, match="up_proj"):
        export_model(adapter_factory(), base, tmp_path / "out", **OPTIONS[name])
    assert not list(tmp_path.glob("*out*"))


def test_a_wrong_shape_is_a_wrong_header(base_factory: Any, adapter_factory: Any, tmp_path: Path) -> None:
    base, adapter = base_factory(), adapter_factory()
    export_model(adapter, base, tmp_path / "out", certificate=False, quantize="w8a16")
    plan = plan_export(adapter, base, tmp_path / "other", quantize="w8a16")
    file = tmp_path / "out" / "model.safetensors"
    tensor = next(t for t in read_header(file) if t.name == f"{UP}.weight_shape")
    with file.open("r+b") as stream:
        stream.seek(tensor.start)
        stream.write(b"\x01")
    with pytest.raises(IntegrityError, match="header"):
        certify(plan, tmp_path / "out")


def test_untied_heads_and_saved_modules(base_factory: Any, adapter_factory: Any, tmp_path: Path) -> None:
    """What takes the base's place is quantised as that would be; a new head stays as it is."""
    base, adapter = (
        base_factory(tied=True),
        adapter_factory(targets=["q_proj"], config={"modules_to_save": ["up_proj"]}),
    )
    file = adapter / "adapter_model.safetensors"
    tensors = load_file(file)
    saved = torch.randn(128, 64, generator=torch.Generator().manual_seed(3))
    head = {"A": torch.randn(4, 64), "B": torch.randn(260, 4)}
    tensors |= {f"base_model.model.lm_head.lora_{half}.weight": factor for half, factor in head.items()}
    save_file(tensors | {f"base_model.model.{UP}.weight": saved}, file)
    config = json.loads((adapter / "adapter_config.json").read_text())
    (adapter / "adapter_config.json").write_text(json.dumps(config | {"target_modules": ["q_proj", "lm_head"]}))
    result = export_model(adapter, base, tmp_path / "out", quantize="w8a8")
    found = modules(tmp_path / "out")
    assert found["lm_head"].keys() == {"weight"}
    back = found[UP]["weight"].float() * found[UP]["weight_scale"]
    assert float((back - saved).abs().max()) <= float(found[UP]["weight_scale"].max()) / 2 * 1.001
    assert result.certificate is not None
    assert result.certificate.applied == 3
    written = json.loads((tmp_path / "out" / "config.json").read_text())
    assert written["tie_word_embeddings"] is False
    assert written["quantization_config"]["ignore"] == ["lm_head"]


@pytest.mark.slow
def test_answers_are_compared(base_factory: Any, adapter_factory: Any, ah: Any, tmp_path: Path) -> None:
    words = ("export", adapter_factory(), "--base", base_factory(dtype="bfloat16").path, "--kl-divergence")
    told = {}
    for name in ("w8a16", "w4a16"):
        size = ("--group-size", "64") if name == "w4a16" else ()
        ran = ah(*words, "--quantize", name, *size, "--to", tmp_path / name, "--json")
        assert ran.code == 0, ran.err
        told[name] = json.loads(ran.out)["certificate"]["quantised"]["kl_divergence"]
        certificate = json.loads((tmp_path / name / "export.json").read_text())
        assert certificate["quantised"]["kl_divergence"] == told[name]
        assert not any(path.is_dir() for path in (tmp_path / name).iterdir())
    assert 0 < told["w8a16"]["kl_mean"] < told["w4a16"]["kl_mean"] < 1
    assert told["w8a16"]["kl_mean"] <= told["w8a16"]["kl_largest"]
    assert 0.5 < told["w8a16"]["same_top"] <= 1
    assert told["w8a16"]["positions"] > 100


def configured(base: BaseModel, **changes: Any) -> BaseModel:
    from adapterhub.base import find_base

    file = base.path / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))
    return find_base(str(base.path))


def test_bad_input(base_factory: Any, adapter_factory: Any, ah: Any, tmp_path: Path) -> None:
    base, adapter = base_factory(), adapter_factory()

    def refused(error: type[Exception], base: BaseModel = base, **options: Any) -> str:
        with pytest.raises(error) as caught:
            plan_export(adapter, base, tmp_path / "out", **options)
        return "\n".join(str(part) for part in (caught.value, vars(caught.value)))

    assert "--group-size 64" in refused(Unsupported, quantize="w4a16")  # 64 columns, groups of 128
    assert "w8a8" in refused(UsageError, quantize="int8")
    assert "w4a16" in refused(UsageError, quantize="int4")
    assert "another tool" in refused(UsageError, quantize="gptq")
    assert "fp8" in refused(UsageError, quantize="q5")
    assert "128, 64, 32" in refused(UsageError, quantize="w4a16", group_size=48)
    assert "one scale a row" in refused(UsageError, quantize="w8a8", group_size=64)
    assert "--quantize" in refused(UsageError, group_size=64)
    quantised = {"quantization_config": {"quant_method": "bitsandbytes"}}
    why = refused(Unsupported, configured(base_factory("bnb"), **quantised), quantize="w8a8")
    assert "already" in why
    assert "--base" in why
    assert "llm-compressor" in refused(
        Unsupported, configured(base_factory("other"), model_type="gpt2"), quantize="fp8"
    )
    ran = ah(
        "export", adapter, "--base", base.path, "--to", tmp_path / "m.gguf", "--format", "gguf", "--quantize", "fp8"
    )
    assert ran.code == 2
    assert "--gguf-type" in ran.err


def test_a_base_in_float8_is_quantised_already(base_factory: Any, adapter_factory: Any, tmp_path: Path) -> None:
    from adapterhub.base import find_base

    base = base_factory()
    tensors = load_file(base.path / "model.safetensors")
    tensors[f"{UP}.weight"] = tensors[f"{UP}.weight"].to(torch.float8_e4m3fn)
    save_file(tensors, base.path / "model.safetensors")
    with pytest.raises(Unsupported, match="already"):
        plan_export(adapter_factory(), find_base(str(base.path)), tmp_path / "out", quantize="w8a8")


def test_no_width_fits_any_group(base_factory: Any, adapter_writer: Any, tmp_path: Path) -> None:
    from adapterhub.base import find_base
    from tests.conftest import write_tiny_base

    base = write_tiny_base(tmp_path / "narrow", hidden=40)
    adapter = adapter_writer(tmp_path / "a", base=base)
    with pytest.raises(Unsupported) as caught:
        plan_export(adapter, find_base(str(base)), tmp_path / "out", quantize="w4a16")
    assert "w8a8" in str(caught.value.hint)
