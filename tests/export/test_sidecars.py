"""What stands beside the weights: the base's files, the adapter's tokenizer and template where it brings its own."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from adapterhub.export import export_model
from adapterhub.export.sidecars import choose, with_dtype


def fill(folder: Path, **files: object) -> Path:
    folder.mkdir(exist_ok=True)
    for name, content in files.items():
        path = folder / name.replace("__", ".")
        path.write_text(content if isinstance(content, str) else json.dumps(content))
    return folder


@pytest.fixture
def base(tmp_path: Path) -> Path:
    return fill(
        tmp_path / "base",
        config__json={},
        tokenizer__json={},
        tokenizer_config__json={},
        vocab__json={},
        chat_template__jinja="base",
        generation_config__json={},
        LICENSE="free",
        README__md="the base's card",
        modeling_new__py="",
        adapter_config__json={},
        pytorch_model__bin="",
        model__safetensors__index__json={},
    )


def chosen_from(base: Path, adapter: Path) -> dict[str, str]:
    return {name: path.parent.name for name, path in choose(base, adapter).items()}


def test_from_the_base_alone(base: Path, tmp_path: Path) -> None:
    adapter = fill(tmp_path / "adapter", adapter_config__json={}, README__md="")
    assert set(chosen_from(base, adapter)) == {
        "tokenizer.json", "tokenizer_config.json", "vocab.json", "chat_template.jinja", "generation_config.json",
        "LICENSE", "modeling_new.py",
    }  # fmt: skip


def test_a_template_alone(base: Path, tmp_path: Path) -> None:
    adapter = fill(tmp_path / "adapter", chat_template__jinja="mine")
    chosen = chosen_from(base, adapter)
    assert chosen["chat_template.jinja"] == "adapter"
    assert chosen["tokenizer.json"] == "base"


def test_a_whole_tokenizer_replaces_all_of_the_other(base: Path, tmp_path: Path) -> None:
    adapter = fill(tmp_path / "adapter", tokenizer__json={}, tokenizer_config__json={}, chat_template__jinja="mine")
    chosen = chosen_from(base, adapter)
    assert chosen["tokenizer.json"] == chosen["tokenizer_config.json"] == chosen["chat_template.jinja"] == "adapter"
    assert "vocab.json" not in chosen


def test_a_template_inside_the_tokenizer_config(base: Path, tmp_path: Path) -> None:
    adapter = fill(tmp_path / "adapter", tokenizer__json={}, tokenizer_config__json={"chat_template": "mine"})
    assert "chat_template.jinja" not in chosen_from(base, adapter)  # the base's file would win over it


def test_a_tokenizer_without_any_template(base: Path, tmp_path: Path) -> None:
    adapter = fill(tmp_path / "adapter", tokenizer__json={}, tokenizer_config__json={})
    assert chosen_from(base, adapter)["chat_template.jinja"] == "base"


def test_the_dtype_in_a_config() -> None:
    config = {"dtype": "bfloat16", "text_config": {"torch_dtype": "bfloat16", "n": 1}, "rope": {"theta": 1}}
    assert with_dtype(config, "float32") == {
        "dtype": "float32",
        "text_config": {"torch_dtype": "float32", "n": 1},
        "rope": {"theta": 1},
    }
    assert with_dtype({"torch_dtype": "float16"}, "float32") == {"torch_dtype": "float32"}
    assert with_dtype({}, "float32") == {"dtype": "float32"}


def test_config_and_index_follow_the_dtype(base_factory: Any, adapter_factory: Any, tmp_path: Path) -> None:
    base = base_factory(dtype="bfloat16", shards=2)
    export_model(adapter_factory(), base, tmp_path / "same")
    export_model(adapter_factory(), base, tmp_path / "wide", dtype="float32")
    index = "model.safetensors.index.json"
    assert (tmp_path / "same" / "config.json").read_bytes() == (base.path / "config.json").read_bytes()
    assert json.loads((tmp_path / "wide" / "config.json").read_text()) == base.config | {"dtype": "float32"}
    same, wide = (json.loads((tmp_path / name / index).read_text()) for name in ("same", "wide"))
    assert same["weight_map"] == wide["weight_map"] == base.weight_map
    assert wide["metadata"]["total_size"] == 2 * same["metadata"]["total_size"]


def test_where_the_trained_tokenizer_ends(base_factory: Any, adapter_factory: Any, tmp_path: Path) -> None:
    base, adapter = base_factory(), adapter_factory()
    export_model(adapter, base, tmp_path / "plain")
    assert not (tmp_path / "plain" / "generation_config.json").exists()
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (adapter / name).write_bytes((base.path / name).read_bytes())
    export_model(adapter, base, tmp_path / "same end")
    assert not (tmp_path / "same end" / "generation_config.json").exists()
    settings = json.loads((adapter / "tokenizer_config.json").read_text())
    (adapter / "tokenizer_config.json").write_text(json.dumps(settings | {"eos_token": "<|im_start|>"}))
    export_model(adapter, base, tmp_path / "other end")
    told = json.loads((tmp_path / "other end" / "generation_config.json").read_text())
    assert told == {"eos_token_id": [258, base.config["eos_token_id"]]}


def test_the_folder_is_a_model_and_no_adapter(base_factory: Any, adapter_factory: Any, tmp_path: Path) -> None:
    export_model(adapter_factory(), base_factory(shards=2), tmp_path / "out")
    assert {p.name for p in (tmp_path / "out").iterdir()} == {
        "README.md", "chat_template.jinja", "config.json", "export.json", "tokenizer.json", "tokenizer_config.json",
        "model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors", "model.safetensors.index.json",
    }  # fmt: skip
