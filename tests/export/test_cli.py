"""`ah export`, `ah verify`: from a name to a model, and every wrong turn with exit code 2."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file

from adapterhub.registry import AdapterName, draft, open_registry
from adapterhub.settings import load_settings


@pytest.fixture
def published(base_factory: Any, adapter_factory: Any) -> str:
    """A version in the default registry, and where its base is."""
    base = base_factory()
    registry = open_registry(load_settings().registry)
    record = registry.publish(draft(adapter_factory(), base=base), name=AdapterName.parse("acme/support"), author="ana")
    registry.set_channel(record.name, "prod", {1: 100}, who="ana")
    return str(base.path)


def test_a_published_version(published: str, ah: Any, tmp_path: Path) -> None:
    ran = ah("export", "acme/support@prod", "--base", published, "--to", tmp_path / "out", "--dtype", "float32")
    assert (ran.code, ran.out) == (0, f"{tmp_path / 'out'}\n")
    told = json.loads((tmp_path / "out" / "export.json").read_text())
    assert told["adapter"]["ref"] == "acme/support@1"
    assert told["adapter"]["digest"].startswith("sha256:")
    assert "acme/support@1" in (tmp_path / "out" / "README.md").read_text()
    assert ah("verify", tmp_path / "out").code == 0


def test_pull_merged_makes_the_same_weights(published: str, ah: Any, tmp_path: Path) -> None:
    assert ah("export", "acme/support", "--base", published, "--to", tmp_path / "a").code == 0
    assert ah("pull", "acme/support@1", "--merged", "--base", published, "--to", tmp_path / "b").code == 0
    assert (tmp_path / "a" / "model.safetensors").read_bytes() == (tmp_path / "b" / "model.safetensors").read_bytes()


def test_a_directory_as_json(base_factory: Any, adapter_factory: Any, ah: Any, tmp_path: Path) -> None:
    ran = ah("export", adapter_factory(), "--base", base_factory().path, "--to", tmp_path / "out", "--json")
    told = json.loads(ran.out)
    assert told["path"] == str(tmp_path / "out")
    assert told["merged"] == 14
    assert told["certificate"]["merged"] == {"planned": 14, "applied": 14}


def test_a_plan_writes_nothing(base_factory: Any, adapter_factory: Any, ah: Any, tmp_path: Path) -> None:
    base, adapter = base_factory(), adapter_factory()
    before = sorted(tmp_path.rglob("*"))
    words = ("export", adapter, "--base", base.path, "--to", tmp_path / "out", "--plan")
    text, data = ah(*words), ah(*words, "--json")
    assert (text.code, data.code) == (0, 0)
    assert "14 merged" in text.out
    assert json.loads(data.out)["tensors"]["merged"] == 14
    assert sorted(tmp_path.rglob("*")) == before


def test_no_certificate(base_factory: Any, adapter_factory: Any, ah: Any, tmp_path: Path) -> None:
    words = ("--base", base_factory().path, "--to", tmp_path / "out", "--no-certificate")
    assert ah("export", adapter_factory(), *words).code == 0
    assert load_file(tmp_path / "out" / "model.safetensors")
    assert not (tmp_path / "out" / "export.json").exists()
    assert ah("verify", tmp_path / "out").code == 2


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["acme/support@9", "--base", "{base}", "--to", "{to}"], "acme/support"),
        (["acme/other", "--base", "{base}", "--to", "{to}"], "acme/other"),
        (["globex/support", "--base", "{base}", "--to", "{to}"], "globex"),
        (["acme/support@nope", "--base", "{base}", "--to", "{to}"], "nope"),
        (["../../etc", "--base", "{base}", "--to", "{to}"], "not an adapter directory"),
        (["/nowhere", "--base", "{base}", "--to", "{to}"], "no such folder"),
        (["a" * 5000, "--base", "{base}", "--to", "{to}"], "not an adapter name"),
        (["acme/support", "--to", "{to}"], "--base"),
        (["acme/support", "--base", "{to}/nothing", "--to", "{to}"], "was not found"),
        (["acme/support", "--base", "{base}", "--to", "{base}"], "exists"),
        (["acme/support", "--base", "{base}", "--to", "{base}/config.json/out"], "cannot be written"),
        (["acme/support", "--base", "{base}", "--to", "{to}", "--dtype", "int4"], "int4"),
    ],
)
def test_wrong_turns(words: list[str], told: str, published: str, ah: Any, tmp_path: Path) -> None:
    before = sorted(tmp_path.rglob("*"))
    ran = ah("export", *(word.format(base=published, to=tmp_path / "out") for word in words))
    assert ran.code == 2
    assert told in ran.err
    assert ran.out == ""
    assert sorted(tmp_path.rglob("*")) == before


def test_another_base_than_the_version_was_trained_on(
    published: str, base_factory: Any, ah: Any, tmp_path: Path
) -> None:
    other = base_factory("other")
    file = other.path / "model.safetensors"
    data = bytearray(file.read_bytes())
    data[-8:] = b"\0" * 8
    file.write_bytes(data)
    ran = ah("export", "acme/support", "--base", other.path, "--to", tmp_path / "out")
    assert ran.code == 2
    assert "another base" in ran.err
    assert not (tmp_path / "out").exists()


def test_a_yanked_version(published: str, ah: Any, tmp_path: Path) -> None:
    assert ah("yank", "acme/support@1", "--why", "wrong policy").code == 0
    ran = ah("export", "acme/support@1", "--base", published, "--to", tmp_path / "out")
    assert ran.code == 2
    assert "yanked" in ran.err
