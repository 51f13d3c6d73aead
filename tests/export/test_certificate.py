"""The certificate sees what is wrong with a model, and says nothing of one that is right."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file

from adapterhub.errors import IntegrityError, NotFound
from adapterhub.export import Plan, export_model, plan_export, verify
from adapterhub.export.certificate import certify
from adapterhub.export.floats import distance, step, widen
from adapterhub.peftdir import Tensor, read_header

Made = tuple[Plan, Path]


@pytest.fixture(params=[None, "float32", "float16"], ids=["bfloat16", "float32", "float16"])
def made(request: pytest.FixtureRequest, base_factory: Any, adapter_factory: Any, tmp_path: Path) -> Made:
    """A plan, and a folder with the model it makes."""
    base, adapter = base_factory(dtype="bfloat16", shards=2), adapter_factory(scale=0.1)
    export_model(adapter, base, tmp_path / "out", dtype=request.param, certificate=False)
    return plan_export(adapter, base, tmp_path / "other", dtype=request.param), tmp_path / "out"


def tensor_in(folder: Path, name: str) -> tuple[Path, Tensor]:
    return next((file, t) for file in sorted(folder.glob("*.safetensors")) for t in read_header(file) if t.name == name)


def patch(file: Path, offset: int, data: bytes) -> None:
    with file.open("r+b") as stream:
        stream.seek(offset)
        stream.write(data)


def test_a_right_model_passes(made: Made) -> None:
    certificate = certify(*made)
    assert len(certificate.merged) == certificate.planned == 14
    assert certificate.sampled > 1000
    assert 0 < certificate.worst <= 1
    for check in certificate.merged:
        assert math.isclose(check.norm_planned, check.norm_found, rel_tol=0.01)


def test_a_changed_byte_where_nothing_should_change(made: Made) -> None:
    file, tensor = tensor_in(made[1], "model.embed_tokens.weight")
    patch(file, tensor.end - 1, bytes([file.read_bytes()[tensor.end - 1] ^ 0x40]))
    with pytest.raises(IntegrityError):
        certify(*made)


@pytest.mark.parametrize("where", ["first", "last"])
def test_a_wrong_value_in_a_sampled_row(where: str, made: Made) -> None:
    file, tensor = tensor_in(made[1], "model.layers.1.mlp.up_proj.weight")
    width = (tensor.end - tensor.start) // (tensor.shape[0] * tensor.shape[1])
    offset = tensor.start if where == "first" else tensor.end - width
    top = offset + width - 1  # sign and exponent
    patch(file, top, bytes([file.read_bytes()[top] ^ 0x80]))
    with pytest.raises(IntegrityError, match="steps from the right one"):
        certify(*made)


def test_a_tensor_that_was_not_merged(made: Made, base_factory: Any) -> None:
    plan, folder = made
    operation = next(op for op in plan.merged if op.source.name.endswith("layers.0.mlp.up_proj.weight"))
    original = load_file(plan.files[0].operations[0].file) | load_file(plan.files[1].operations[0].file)
    file, tensor = tensor_in(folder, operation.source.name)
    dtype = {"BF16": torch.bfloat16, "F32": torch.float32, "F16": torch.float16}[tensor.dtype]
    unmerged = original[operation.source.name].to(dtype)
    rows = load_file(file)[operation.source.name]
    for row in range(tensor.shape[0]):  # all rows but those that are sampled keep their old values
        if row not in {0, tensor.shape[0] - 1}:
            rows[row] = unmerged[row]
    patch(file, tensor.start, rows.contiguous().view(torch.uint8).numpy().tobytes())
    with pytest.raises(IntegrityError):
        certify(plan, folder)


def test_the_norm_alone_sees_what_no_sampled_row_shows(made: Made, monkeypatch: pytest.MonkeyPatch) -> None:
    plan, folder = made
    file, tensor = tensor_in(folder, "model.layers.0.mlp.gate_proj.weight")
    original = load_file(next(f.operations[0].file for f in plan.files if f.name == file.name))[tensor.name]
    rows = load_file(file)[tensor.name]
    rows[1:-1] = original[1:-1].to(rows.dtype)
    patch(file, tensor.start, rows.contiguous().view(torch.uint8).numpy().tobytes())
    monkeypatch.setattr("adapterhub.export.certificate._ROWS", 2)  # the first and the last
    with pytest.raises(IntegrityError, match="Frobenius"):
        certify(plan, folder)


def test_another_header(made: Made) -> None:
    file = sorted(made[1].glob("*.safetensors"))[0]
    patch(file, 8, file.read_bytes()[8:40].replace(b"weight", b"WEIGHT").replace(b"__metadata__", b"__METADATA__"))
    with pytest.raises(IntegrityError, match="header"):
        certify(*made)


def test_export_json(base_factory: Any, adapter_factory: Any, tmp_path: Path) -> None:
    base = base_factory()
    result = export_model(adapter_factory(), base, tmp_path / "out")
    told = json.loads((tmp_path / "out" / "export.json").read_text())
    assert told["merged"] == {"planned": 14, "applied": 14}
    assert told["kept"]["tensors"] == 7
    assert told["base"]["content"] == base.fingerprint.content
    assert set(told["files"]) == {p.name for p in (tmp_path / "out").iterdir()} - {"export.json"}
    assert str(tmp_path) not in (tmp_path / "out" / "export.json").read_text()
    assert result.certificate
    assert result.certificate_seconds > 0
    assert verify(tmp_path / "out") == told


def test_without_a_certificate(base_factory: Any, adapter_factory: Any, tmp_path: Path) -> None:
    result = export_model(adapter_factory(), base_factory(), tmp_path / "out", certificate=False)
    assert result.certificate is None
    assert not (tmp_path / "out" / "export.json").exists()
    with pytest.raises(NotFound, match="no certificate"):
        verify(tmp_path / "out")


CHANGES: dict[str, tuple[Callable[[Path], object], str]] = {
    "changed": (lambda f: (f / "config.json").write_text("{}"), "config.json was changed"),
    "added": (lambda f: (f / "extra.safetensors").write_bytes(b""), "extra.safetensors is not of this export"),
    "lost": (lambda f: (f / "tokenizer.json").unlink(), "tokenizer.json is missing"),
}


@pytest.mark.parametrize("case", CHANGES)
def test_verify_sees_what_happened_since(case: str, base_factory: Any, adapter_factory: Any, tmp_path: Path) -> None:
    export_model(adapter_factory(), base_factory(), tmp_path / "out")
    change, told = CHANGES[case]
    change(tmp_path / "out")
    with pytest.raises(IntegrityError, match=told):
        verify(tmp_path / "out")


NUMBERS = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}


@settings(deadline=None)  # a busy machine is no failure
@given(value=st.floats(width=32, allow_nan=False, allow_infinity=False), dtype=st.sampled_from(sorted(NUMBERS)))
def test_widen_and_distance_agree_with_torch(value: float, dtype: str) -> None:
    rounded = torch.tensor([value]).to(NUMBERS[dtype])
    widened = widen(rounded.view(torch.uint8).numpy().tobytes(), dtype)
    assert torch.equal(torch.from_numpy(widened.copy()), rounded.float())
    if bool(rounded.isfinite()):
        assert distance(widened, np.array([value], dtype=np.float64), dtype)[0] <= 0.5  # torch rounds to the nearest


@pytest.mark.parametrize("dtype", sorted(NUMBERS))
@pytest.mark.parametrize("value", [1.0, 1.5, 0.75, 3.0, 1e-3])
def test_a_step_leads_to_the_next_number(dtype: str, value: float) -> None:
    here = torch.tensor(value).to(NUMBERS[dtype])
    following = torch.nextafter(here, torch.tensor(torch.inf, dtype=NUMBERS[dtype]))
    assert step(here.double().numpy(), dtype) == float(following.double() - here.double())
