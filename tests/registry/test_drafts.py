"""What may be published: everything that is refused is refused here."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from adapterhub.base import BaseModel, find_base
from adapterhub.errors import AdapterError, BaseMismatch, Unsupported
from adapterhub.manifest import Lineage
from adapterhub.refs import AdapterName
from adapterhub.registry import draft
from adapterhub.runrecord import RunRecord

Factory = Callable[..., Path]
WEIGHTS = "adapter_model.safetensors"
PREFIX = "base_model.model.model.layers.0.self_attn.q_proj"


@pytest.fixture(scope="module")
def base(tiny_base: Path) -> BaseModel:
    return find_base(str(tiny_base))


@pytest.fixture
def run_folder(adapter_factory: Factory, base: BaseModel, tmp_path: Path) -> Path:
    """What `ah train` leaves: RUN/run.json and RUN/adapter/."""
    adapter_factory("run/adapter")
    record = RunRecord(
        base=base.fingerprint,
        lineage=Lineage(method="sft", seed=3, metrics={"eval_loss": 1.25}),
        name=AdapterName("acme", "support"),
        chat_template_sha256="c" * 64,
        tokenizer_sha256="d" * 64,
    )
    record.write(tmp_path / "run" / "run.json")
    return tmp_path / "run"


def change(path: Path, change: Callable[[dict[str, Any]], object]) -> None:
    tensors = load_file(path / WEIGHTS)
    change(tensors)
    save_file(tensors, path / WEIGHTS)


def test_the_manifest_says_what_is_in_the_folder(adapter_factory: Factory, base: BaseModel) -> None:
    path = adapter_factory(rank=8, alpha=32)
    made = draft(path, base=base)
    weights = next(f for f in made.manifest.files if f.path == WEIGHTS)
    assert weights.sha256 == hashlib.sha256((path / WEIGHTS).read_bytes()).hexdigest()
    assert weights.size == (path / WEIGHTS).stat().st_size
    assert made.manifest.lora.rank == 8
    assert made.manifest.base == base.fingerprint
    assert {made.verdicts.serve.answer, made.verdicts.merge.answer, made.verdicts.gguf.answer} == {"yes"}


def test_the_same_adapter_has_the_same_digest_wherever_it_lies(adapter_factory: Factory, tmp_path: Path) -> None:
    path = adapter_factory()
    copy = Path(shutil.copytree(path, tmp_path / "elsewhere"))
    config = json.loads((copy / "adapter_config.json").read_text())
    (copy / "adapter_config.json").write_text(json.dumps(config, indent=7))
    assert draft(path).manifest.digest == draft(copy).manifest.digest


def test_only_known_files_are_published(adapter_factory: Factory) -> None:
    path = adapter_factory()
    for name in ("chat_template.jinja", "tokenizer.json", "README.md"):
        (path / name).write_text(name)
    for name in ("training_args.bin", "optimizer.pt", ".env", "notes.txt", "adapter_model.bin"):
        (path / name).write_text("not yours")
    (path / "checkpoint-10").mkdir()
    made = draft(path)
    assert sorted(f.path for f in made.manifest.files) == [
        "README.md",
        "adapter_config.json",
        WEIGHTS,
        "chat_template.jinja",
        "tokenizer.json",
    ]
    assert made.manifest.chat_template_sha256 == hashlib.sha256(b"chat_template.jinja").hexdigest()
    assert made.manifest.tokenizer_sha256 == hashlib.sha256(b"tokenizer.json").hexdigest()


def test_the_published_config_has_no_secrets_and_no_paths(adapter_factory: Factory) -> None:
    path = adapter_factory(config={"base_model_name_or_path": "/home/ana/secret-project/tiny", "hub_token": "hf_x"})
    made = draft(path)
    published = made.replaced["adapter_config.json"]
    entry = next(f for f in made.manifest.files if f.path == "adapter_config.json")
    assert entry.sha256 == hashlib.sha256(published).hexdigest()
    assert b"secret-project" not in published
    assert b"hf_x" not in published
    assert json.loads(published)["base_model_name_or_path"] == "tiny"
    assert "secret-project" in (path / "adapter_config.json").read_text()  # the user's own file stays


def test_without_the_base_nobody_knows_whether_it_fits(adapter_factory: Factory) -> None:
    made = draft(adapter_factory())
    assert made.manifest.base is None
    for verdict in (made.verdicts.serve, made.verdicts.merge, made.verdicts.gguf):
        assert verdict.answer == "unknown"
        assert "base" in verdict.reason


@pytest.mark.parametrize("inside", [False, True])
def test_a_run_brings_its_base_and_lineage(run_folder: Path, base: BaseModel, inside: bool) -> None:
    made = draft(run_folder / "adapter" if inside else run_folder)
    assert made.run is not None
    assert made.run.name == AdapterName("acme", "support")
    assert made.manifest.base == base.fingerprint
    assert made.manifest.lineage.metrics == {"eval_loss": 1.25}
    assert made.manifest.chat_template_sha256 == "c" * 64
    assert made.verdicts.serve.answer == "unknown"
    assert draft(run_folder, base=base).verdicts.serve.answer == "yes"


def test_a_run_that_is_not_finished_has_no_adapter(run_folder: Path) -> None:
    shutil.rmtree(run_folder / "adapter")
    with pytest.raises(AdapterError, match="no such folder"):
        draft(run_folder)


def test_another_base_than_the_runs_is_refused(run_folder: Path, tiny_base: Path, tmp_path: Path) -> None:
    copy = Path(shutil.copytree(tiny_base, tmp_path / "other"))
    tensors = load_file(copy / "model.safetensors")
    tensors["model.norm.weight"] = tensors["model.norm.weight"] * 2
    save_file(tensors, copy / "model.safetensors")
    with pytest.raises(BaseMismatch):
        draft(run_folder, base=find_base(str(copy)))


def test_tensors_that_the_base_does_not_have_are_refused(adapter_factory: Factory, base: BaseModel) -> None:
    path = adapter_factory()
    tensors = load_file(path / WEIGHTS)
    save_file({k.replace("self_attn", "attention"): v for k, v in tensors.items()}, path / WEIGHTS)
    assert draft(path).verdicts.serve.answer == "unknown"
    with pytest.raises(BaseMismatch, match="attention"):
        draft(path, base=base)


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_numbers_that_are_none_are_refused(adapter_factory: Factory, bad: float) -> None:
    path = adapter_factory()
    change(path, lambda t: t[f"{PREFIX}.lora_A.weight"].__setitem__((1, 1), bad))
    with pytest.raises(AdapterError, match="NaN or infinite") as refused:
        draft(path)
    assert f"{PREFIX}.lora_A.weight" in refused.value.why


def test_an_untrained_adapter_is_refused_unless_it_is_meant(adapter_factory: Factory) -> None:
    path = adapter_factory()
    change(path, lambda t: t.update({k: np.zeros_like(v) for k, v in t.items() if "lora_B" in k}))
    with pytest.raises(AdapterError, match="changes nothing") as refused:
        draft(path)
    assert "--allow-zero" in refused.value.hint
    assert draft(path, allow_zero=True).manifest.files
    change(path, lambda t: t[f"{PREFIX}.lora_B.weight"].__setitem__((0, 0), 1))
    assert draft(path).manifest.files  # one module learned something


def test_what_can_only_be_merged_is_for_export(adapter_factory: Factory) -> None:
    path = adapter_factory(rank=600, targets=["q_proj"])
    with pytest.raises(Unsupported, match="cannot be served") as refused:
        draft(path)
    assert "--for export" in refused.value.hint
    made = draft(path, purpose="export")
    assert (made.verdicts.serve.answer, made.verdicts.merge.answer) == ("no", "unknown")


def test_what_is_good_for_nothing_is_refused(adapter_factory: Factory) -> None:
    path = adapter_factory(config={"use_dora": True})
    with pytest.raises(Unsupported, match="cannot be served") as refused:
        draft(path)
    assert "export" not in refused.value.hint
    with pytest.raises(Unsupported, match="cannot be exported"):
        draft(path, purpose="export")


@pytest.mark.parametrize("name", [WEIGHTS, "adapter_config.json", "README.md", "tokenizer.json"])
def test_links_are_not_followed(adapter_factory: Factory, tmp_path: Path, name: str) -> None:
    path = adapter_factory()
    (tmp_path / "outside").write_text("a secret")
    target = tmp_path / "outside"
    if (path / name).exists():
        target = (path / name).rename(tmp_path / name)
    (path / name).symlink_to(target)
    with pytest.raises(AdapterError, match="symbolic link"):
        draft(path)


def test_a_folder_in_place_of_a_file_is_said(adapter_factory: Factory) -> None:
    path = adapter_factory()
    (path / "tokenizer.json").mkdir()
    with pytest.raises(AdapterError, match=r"tokenizer\.json cannot be read"):
        draft(path)
