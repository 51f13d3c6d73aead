"""The merged weights: the float32 sum rounded once, everything else untouched."""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from adapterhub.base import find_base
from adapterhub.errors import AdapterError, Unsupported
from adapterhub.export import ExportResult, export_model
from adapterhub.peftdir import read_header

LINEAR = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
DTYPES = ["float32", "float16", "bfloat16"]


def reference(adapter: Path, module: str, *, scale: float) -> torch.Tensor:
    """s·B·A in float64."""
    factors = load_file(adapter / "adapter_model.safetensors")
    a, b = (factors[f"base_model.model.{module}.lora_{x}.weight"].double() for x in "AB")
    return scale * (b @ a)


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_every_weight_is_the_float32_sum_rounded_once(
    data: st.DataObject,
    base_factory: Any,
    adapter_factory: Any,
    load_model: Any,
    tmp_path_factory: pytest.TempPathFactory,
) -> None:
    stored = data.draw(st.sampled_from(DTYPES), label="base")
    wanted = data.draw(st.sampled_from([None, *DTYPES]), label="--dtype")
    rank = data.draw(st.integers(1, 16), label="rank")
    alpha = data.draw(st.floats(0.5, 64), label="alpha")
    rslora = data.draw(st.booleans(), label="rslora")
    targets = data.draw(st.lists(st.sampled_from(LINEAR), min_size=1, unique=True), label="targets")
    special = data.draw(st.sampled_from(targets), label="alpha pattern")
    folder = tmp_path_factory.mktemp("merge")
    base = base_factory(
        str(folder / "base"), dtype=stored, shards=data.draw(st.integers(1, 3)), tied=data.draw(st.booleans())
    )
    adapter = adapter_factory(
        str(folder / "adapter"), rank=rank, alpha=alpha, targets=targets, seed=data.draw(st.integers(0, 9)),
        dtype=data.draw(st.sampled_from(["float32", "float16"])),
        config={"use_rslora": rslora, "alpha_pattern": {special: 3.0}},
    )  # fmt: skip

    export_model(adapter, base, folder / "out", dtype=wanted, certificate=False)

    before, after = load_model(base.path), load_model(folder / "out")
    assert before.keys() == after.keys()
    wrong = compared = 0
    for name, old in before.items():
        module = name.removesuffix(".weight")
        dtype = getattr(torch, wanted or stored)
        if module.rsplit(".", 1)[-1] not in targets:
            assert torch.equal(after[name], old.to(dtype))
            continue
        by = 3.0 if module.endswith(special) else alpha
        delta = reference(adapter, module, scale=by / (rank**0.5 if rslora else rank))
        straight = (old.float() + delta.float()).to(dtype)
        assert after[name].dtype == dtype
        wrong += int((after[name] != straight).sum())
        compared += old.numel()
        slack = (rank + 4) * 2**-24 * (old.double().abs() + delta.abs() * rank)
        half_a_step = 2.0 ** -{"float32": 24, "float16": 11, "bfloat16": 8}[wanted or stored]
        truth = old.double() + delta
        assert bool(((after[name].double() - truth).abs() <= half_a_step * truth.abs() + slack + 2**-25).all())
    if (wanted or stored) != "float32":
        assert wrong <= 3 + compared / 1000  # where float32 itself lies on the other side of a tie


def test_untouched_tensors_and_headers_keep_their_bytes(
    base_factory: Any, adapter_factory: Any, tmp_path: Path
) -> None:
    base = base_factory(dtype="bfloat16", shards=3)
    export_model(adapter_factory(targets=["v_proj"]), base, tmp_path / "out")
    changed = 0
    for file in base.weight_files:
        old, new = file.read_bytes(), (tmp_path / "out" / file.name).read_bytes()
        assert len(old) == len(new)
        edge = 0
        for tensor in read_header(file):
            if ".v_proj." in tensor.name:
                assert old[edge : tensor.start] == new[edge : tensor.start]
                assert old[tensor.start : tensor.end] != new[tensor.start : tensor.end]
                edge, changed = tensor.end, changed + 1
        assert old[edge:] == new[edge:]
    assert changed == 2


@pytest.mark.parametrize("prefix", ["", "transformer."], ids=["as the Hub's gpt2", "as save_pretrained writes it"])
def test_weights_kept_as_in_out_are_merged_transposed(prefix: str, tmp_path: Path, load_model: Any) -> None:
    generator = torch.Generator().manual_seed(0)
    shapes = {"attn.c_attn": (8, 24), "attn.c_proj": (8, 8), "mlp.c_fc": (8, 32)}
    base = {f"{prefix}h.0.{n}.weight": torch.randn(s, generator=generator) for n, s in shapes.items()}
    factors = {}
    for name, (width, out) in shapes.items():
        at = f"base_model.model.transformer.h.0.{name}"
        factors[f"{at}.lora_A.weight"] = torch.randn(2, width, generator=generator)
        factors[f"{at}.lora_B.weight"] = torch.randn(out, 2, generator=generator)
    for folder, tensors, config in (
        ("base", base, {"model_type": "gpt2"}),
        ("adapter", factors, {"peft_type": "LORA", "r": 2, "lora_alpha": 4, "fan_in_fan_out": True}),
    ):
        (tmp_path / folder).mkdir()
        stem = "adapter_" if folder == "adapter" else ""
        (tmp_path / folder / f"{stem}config.json").write_text(json.dumps(config))
        save_file(tensors, tmp_path / folder / f"{stem}model.safetensors")

    result = export_model(tmp_path / "adapter", find_base(str(tmp_path / "base")), tmp_path / "out")

    assert result.merged == 3
    merged = load_model(tmp_path / "out")
    for name, old in base.items():
        delta = reference(
            tmp_path / "adapter", f"transformer.{name.removeprefix(prefix).removesuffix('.weight')}", scale=2
        )
        torch.testing.assert_close(merged[name].double(), old.double() + delta.T, rtol=0, atol=1e-5)


def test_a_model_in_a_hub_cache_is_made_of_links(base_factory: Any, adapter_factory: Any, tmp_path: Path) -> None:
    base = base_factory("blobs", shards=2)
    links = tmp_path / "snapshot"
    links.mkdir()
    for file in base.path.iterdir():
        (links / file.name).symlink_to(os.path.relpath(file, links))
    export_model(adapter_factory(), base, tmp_path / "plain")
    export_model(adapter_factory(), find_base(str(links)), tmp_path / "linked")
    for file in (tmp_path / "plain").glob("*.safetensors"):
        assert not (tmp_path / "linked" / file.name).is_symlink()
        assert (tmp_path / "linked" / file.name).read_bytes() == file.read_bytes()


def test_what_float16_cannot_hold_is_refused(base_factory: Any, adapter_factory: Any, tmp_path: Path) -> None:
    base, adapter = base_factory(dtype="bfloat16"), adapter_factory(scale=300)
    before = sorted(tmp_path.iterdir())
    with pytest.raises(Unsupported, match="65504"):
        export_model(adapter, base, tmp_path / "out", dtype="float16")
    assert sorted(tmp_path.iterdir()) == before


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_an_adapter_that_is_not_finite(value: float, base_factory: Any, adapter_factory: Any, tmp_path: Path) -> None:
    base, adapter = base_factory(), adapter_factory()
    file = adapter / "adapter_model.safetensors"
    factors = load_file(file)
    factors[sorted(factors)[3]][0, 0] = value
    save_file(factors, file)
    before = sorted(tmp_path.iterdir())
    with pytest.raises(AdapterError, match="NaN or infinite"):
        export_model(adapter, base, tmp_path / "out")
    assert sorted(tmp_path.iterdir()) == before


def test_it_says_how_far_it_is(big_base: Any, big_adapter: Path, tmp_path: Path) -> None:
    seen: list[tuple[int, int]] = []
    result = export_model(big_adapter, big_base, tmp_path / "out", progress=lambda *step: seen.append(step))
    done = [step[0] for step in seen]
    assert done == sorted(done)
    assert len(done) > 6
    assert seen[-1] == (2 * result.bytes_written, 2 * result.bytes_written)  # merged, and checked

    seen.clear()
    export_model(big_adapter, big_base, tmp_path / "unchecked", certificate=False, progress=lambda *s: seen.append(s))
    assert seen[-1] == (result.bytes_written, result.bytes_written)


def test_the_caller_keeps_its_threads(base_factory: Any, adapter_factory: Any, tmp_path: Path) -> None:
    before = torch.get_num_threads()
    inside: list[int] = []
    watch: Callable[[int, int], None] = lambda *_: inside.append(torch.get_num_threads())  # noqa: E731
    result = export_model(adapter_factory(), base_factory(), tmp_path / "out", certificate=False, progress=watch)
    assert isinstance(result, ExportResult)
    assert set(inside) == {1}
    assert torch.get_num_threads() == before


MEMORY = Path("/dev/shm")  # a file system of its own on Linux


@pytest.mark.skipif(not os.access(MEMORY, os.W_OK), reason="no second file system")
def test_a_target_on_another_file_system(base_factory: Any, adapter_factory: Any, tmp_path: Path) -> None:
    base, adapter = base_factory(shards=3), adapter_factory(targets=["q_proj"])
    if MEMORY.stat().st_dev == base.path.stat().st_dev:
        pytest.skip("no second file system")
    export_model(adapter, base, tmp_path / "here")
    with tempfile.TemporaryDirectory(dir=MEMORY) as elsewhere:
        export_model(adapter, base, Path(elsewhere) / "there", link=True)  # what cannot be linked is copied
        for file in (tmp_path / "here").glob("*.safetensors"):
            assert (Path(elsewhere) / "there" / file.name).read_bytes() == file.read_bytes()
