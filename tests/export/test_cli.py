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
    told = json.loads(data.out)
    assert told["tensors"]["merged"] == 14
    assert told["seconds"] >= 0
    assert "assumed" in told["speed"]
    assert told["bytes_written"] < told["disk"] < told["disk_free"]
    assert "time     about" in text.out
    assert sorted(tmp_path.rglob("*")) == before


def test_smaller_shards(base_factory: Any, adapter_factory: Any, ah: Any, load_model: Any, tmp_path: Path) -> None:
    base, adapter = base_factory(dtype="bfloat16"), adapter_factory(targets=["q_proj"])
    words = ("export", adapter, "--base", base.path)
    assert ah(*words, "--to", tmp_path / "one").code == 0
    assert ah(*words, "--to", tmp_path / "many", "--max-shard-size", "20KB").code == 0
    many = tmp_path / "many"
    files = sorted(many.glob("*.safetensors"))
    assert len(files) > 5
    assert files[0].name == f"model-00001-of-{len(files):05d}.safetensors"
    index = json.loads((many / "model.safetensors.index.json").read_text())
    assert index["weight_map"] == {name: f.name for f in files for name in load_file(f)}
    one, spread = load_model(tmp_path / "one"), load_model(many)
    assert one.keys() == spread.keys()
    assert all(one[name].equal(spread[name]) for name in one)
    assert ah(*words, "--base", many, "--to", tmp_path / "back", "--max-shard-size", "5GB").code == 0
    assert [f.name for f in (tmp_path / "back").glob("model*")] == ["model.safetensors"]
    assert ah("verify", many).code == 0


def test_links_where_nothing_changes(base_factory: Any, adapter_factory: Any, ah: Any, tmp_path: Path) -> None:
    base, adapter = base_factory(shards=20), adapter_factory(targets=["q_proj"])
    before = {f.name: f.read_bytes() for f in base.weight_files}
    assert ah("export", adapter, "--base", base.path, "--to", tmp_path / "linked", "--link").code == 0
    assert ah("export", adapter, "--base", base.path, "--to", tmp_path / "copied").code == 0
    linked = {f.name for f in base.weight_files if f.samefile(tmp_path / "linked" / f.name)}
    assert 0 < len(linked) < 20
    for name, data in before.items():
        assert (base.path / name).read_bytes() == data
        assert (tmp_path / "linked" / name).read_bytes() == (tmp_path / "copied" / name).read_bytes()
        assert not (base.path / name).samefile(tmp_path / "copied" / name)
        assert (name in linked) == ((tmp_path / "linked" / name).read_bytes() == data)


def test_resume_without_anything_left(base_factory: Any, adapter_factory: Any, ah: Any, tmp_path: Path) -> None:
    words = ("export", adapter_factory(), "--base", base_factory().path, "--to", tmp_path / "out", "--resume")
    assert ah(*words).code == 0
    again = ah(*words)
    assert (again.code, "exists" in again.err) == (2, True)


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
        (["acme/support", "--base", "{base}", "--to", "{to}", "--max-shard-size", "many"], "not a size"),
        (["acme/support", "--base", "{base}", "--to", "{to}", "--max-shard-size", "0GB"], "not a size"),
        (["acme/support", "--base", "{base}", "--to", "{to}", "--base-precision", "nf4"], "nf4"),
        (["acme/support", "--base", "{base}", "--to", "{to}", "--base-precision", "dequantized"], "not quantised"),
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
