"""Several adapters as one: sums against float64, and what is refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from adapterhub import peftdir
from adapterhub.base import find_base
from adapterhub.cli.merge import split_weight
from adapterhub.export.combine import shrink, stack
from adapterhub.refs import AdapterName
from adapterhub.registry import open_registry
from adapterhub.registry.drafts import draft
from adapterhub.settings import load_settings


def deltas(folder: Path) -> dict[str, torch.Tensor]:
    adapter, tensors = peftdir.read(folder), load_file(folder / "adapter_model.safetensors")
    return {f.module: f.scale * tensors[f.b.name].double() @ tensors[f.a.name].double() for f in adapter.factors}


def configure(folder: Path, **changes: Any) -> Path:
    file = folder / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))
    return folder


def test_svd_is_the_nearest_of_its_rank() -> None:
    torch.manual_seed(0)
    parts = [(torch.randn(r, 24), torch.randn(40, r), s) for r, s in ((4, 0.5), (6, 2.0))]
    a, b = stack(parts)
    whole = b.double() @ a.double()
    low_a, low_b, error = shrink(a, b, 3)
    s = torch.linalg.svdvals(whole)
    assert float((whole - low_b @ low_a).norm()) == pytest.approx(float(s[3:].norm()), rel=1e-6)
    assert error == pytest.approx(float(s[3:].norm() / s.norm()), rel=1e-6)


def test_cat_is_the_sum_with_rslora_and_patterns(
    adapter_factory: Any, base_factory: Any, ah: Any, tmp_path: Path
) -> None:
    base = base_factory()
    one = configure(adapter_factory(), use_rslora=True, alpha_pattern={"q_proj": 3})
    two = configure(adapter_factory("b", rank=6, seed=1), lora_alpha=5)
    ran = ah("merge", f"{one}:0.7", f"{two}:-0.3", "--base", base.path, "--to", tmp_path / "sum", "--json")
    assert ran.code == 0
    first, second, result = deltas(one), deltas(two), deltas(tmp_path / "sum" / "adapter")
    for module, made in result.items():
        want = 0.7 * first[module] - 0.3 * second[module]
        assert float((made - want).norm() / want.norm()) < 1e-6
    assert draft(tmp_path / "sum", base=base).manifest.lineage.method == "merge-cat"


@pytest.mark.parametrize("method", [["cat"], ["ties", "--rank", "8", "--density", "0.5"]], ids=["cat", "ties"])
def test_straight_to_a_model(
    method: list[str], adapter_factory: Any, base_factory: Any, ah: Any, load_model: Any, tmp_path: Path
) -> None:
    """The same weights as by way of an adapter, and nothing but the model is left."""
    base, one, two = base_factory(), adapter_factory(), adapter_factory("b", rank=6, seed=1)
    words = ("merge", f"{one}:0.7", f"{two}:-0.3", "--base", base.path, "--method", *method)
    assert ah(*words, "--to", tmp_path / "sum").code == 0
    adapter = tmp_path / "sum" / "adapter"
    assert ah("export", adapter, "--base", base.path, "--to", tmp_path / "by-adapter").code == 0
    before = {path.name for path in tmp_path.iterdir()}
    ran = ah(*words, "--to", tmp_path / "model", "--merged", "--json")
    assert ran.code == 0, ran.err
    assert {path.name for path in tmp_path.iterdir()} == before | {"model"}
    assert json.loads(ran.out)["model"]["certificate"]["merged"] == {"planned": 14, "applied": 14}
    wanted, found = load_model(tmp_path / "by-adapter"), load_model(tmp_path / "model")
    assert wanted.keys() == found.keys()
    assert all(torch.equal(wanted[name], tensor) for name, tensor in found.items())
    assert ah("verify", tmp_path / "model").code == 0
    told = json.loads((tmp_path / "model" / "export.json").read_text())
    assert told["adapter"]["made_of"] == ["0.7 adapter", "-0.3 b"]
    assert "0.7 adapter + -0.3 b" in (tmp_path / "model" / "README.md").read_text()


def test_straight_to_a_quantised_model(adapter_factory: Any, base_factory: Any, ah: Any, tmp_path: Path) -> None:
    words = ("merge", adapter_factory(), adapter_factory("b", seed=1), "--base", base_factory().path)
    ran = ah(*words, "--to", tmp_path / "m", "--merged", "--quantize", "w8a8", "--dtype", "bfloat16")
    assert ran.code == 0, ran.err
    assert "quantised 14 tensors" in ran.err
    refused = ah(*words, "--to", tmp_path / "n", "--merged", "--quantize", "int8")
    assert refused.code == 2
    assert not (tmp_path / "n").exists()


def test_bad_input(adapter_factory: Any, base_factory: Any, ah: Any, tmp_path: Path) -> None:
    one, base, to = adapter_factory(), base_factory().path, tmp_path / "sum"
    assert "two adapters" in ah("merge", one, "--base", base, "--to", to).err
    assert "rank" in ah("merge", one, one, "--base", base, "--to", to, "--method", "svd").err
    assert "base" in ah("merge", one, one, "--to", to).err
    assert "exists" in ah("merge", one, one, "--base", base, "--to", base).err
    assert "exists" in ah("merge", one, one, "--base", base, "--to", base, "--merged").err
    assert "--base" in ah("merge", one, one, "--to", to, "--merged").err
    assert "--merged" in ah("merge", one, one, "--base", base, "--to", to, "--dtype", "float16").err
    assert "--merged" in ah("merge", one, one, "--base", base, "--to", to, "--quantize", "fp8").err
    assert "float32" in ah("merge", one, one, "--base", base, "--to", to, "--merged", "--dtype", "int4").err
    configure(one, use_dora=True)
    assert "DoRA" in ah("merge", one, one, "--base", base, "--to", to).err
    assert not to.exists()


@pytest.fixture
def two_versions(adapter_factory: Any, base_factory: Any) -> list[str]:
    registry, base = open_registry(load_settings().registry), base_factory()
    records = [
        registry.publish(
            draft(adapter_factory(name, seed=seed), base=base), name=AdapterName.parse(f"acme/{name}"), author="ana"
        )
        for seed, name in enumerate(("a", "b"))
    ]
    return [record.digest for record in records]


def test_versions_are_the_parents_and_svd_tells_its_error(two_versions: list[str], ah: Any, tmp_path: Path) -> None:
    words = ("merge", "acme/a@1:0.7", f"acme/b@{two_versions[1]}", "--to", tmp_path / "both")
    ran = ah(*words, "--method", "svd", "--rank", "3", "--json")
    assert ran.code == 0
    told = json.loads(ran.out)
    assert set(told["ranks"].values()) == {3}
    assert all(0 < error < 1 for error in told["errors"].values())
    assert list(draft(tmp_path / "both").manifest.lineage.parents) == two_versions


@pytest.mark.usefixtures("two_versions")
def test_different_bases_are_refused(adapter_factory: Any, base_factory: Any, ah: Any, tmp_path: Path) -> None:
    weights = base_factory("other").path / "model.safetensors"
    save_file({name: -tensor for name, tensor in load_file(weights).items()}, weights)
    other = find_base(str(weights.parent))
    manifest = draft(adapter_factory("c", seed=3), base=other)
    open_registry(load_settings().registry).publish(manifest, name=AdapterName.parse("acme/c"), author="ana")
    ran = ah("merge", "acme/a", "acme/c", "--to", tmp_path / "both")
    assert ran.code != 0
    assert "different bases" in ran.err
    assert not (tmp_path / "both").exists()


@pytest.mark.parametrize(
    ("text", "want"),
    [
        ("acme/a@1:0.7", ("acme/a@1", 0.7)),
        ("runs/a:-2", ("runs/a", -2.0)),
        ("acme/a@sha256:" + "1" * 64, ("acme/a@sha256:" + "1" * 64, 1.0)),
        ("acme/a@prod", ("acme/a@prod", 1.0)),
    ],
)
def test_weights_stand_after_the_last_colon(text: str, want: tuple[str, float]) -> None:
    assert split_weight(text) == want
