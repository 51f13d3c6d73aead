"""Bases in every shape that a merge meets, and a way to run `ah` in this process."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from adapterhub.base import BaseModel, find_base
from adapterhub.cli import output
from adapterhub.cli.main import main

BaseFactory = Callable[..., BaseModel]


@pytest.fixture
def base_factory(tiny_base: Path, tmp_path: Path) -> BaseFactory:
    """Copies of the tiny base: ``base_factory(dtype="bfloat16", shards=3, tied=True)``."""

    def make(name: str = "base", *, dtype: str = "float32", shards: int = 1, tied: bool = False) -> BaseModel:
        folder = tmp_path / name
        shutil.copytree(tiny_base, folder, ignore=shutil.ignore_patterns("*.safetensors"))
        config = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps(config | {"dtype": dtype, "tie_word_embeddings": tied}))
        tensors = load_file(tiny_base / "model.safetensors")
        tensors = {k: v.to(getattr(torch, dtype)) for k, v in tensors.items() if not (tied and k == "lm_head.weight")}
        write_shards(folder, tensors, shards)
        return find_base(str(folder))

    return make


def write_shards(folder: Path, tensors: dict[str, torch.Tensor], shards: int) -> None:
    if shards == 1:
        save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
        return
    names, weight_map = sorted(tensors), {}
    for i in range(shards):
        file = f"model-{i + 1:05d}-of-{shards:05d}.safetensors"
        part = {name: tensors[name] for name in names[i::shards]}
        save_file(part, folder / file, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(part, file)
    index = {"metadata": {"total_size": sum(t.nbytes for t in tensors.values())}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


@pytest.fixture
def big_base(tmp_path: Path) -> BaseModel:
    """24 MB in six files: large enough that an export can be hit in the middle."""
    folder = tmp_path / "big"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps({"model_type": "llama", "hidden_size": 512}))
    generator = torch.Generator().manual_seed(0)
    tensors = {f"model.layers.{i}.mlp.up_proj.weight": torch.randn(512, 512, generator=generator) for i in range(24)}
    write_shards(folder, tensors, 6)
    return find_base(str(folder))


@pytest.fixture
def big_adapter(big_base: BaseModel, tmp_path: Path) -> Path:
    folder = tmp_path / "big-adapter"
    folder.mkdir()
    generator = torch.Generator().manual_seed(1)
    factors = {}
    for name in big_base.tensors:
        prefix = "base_model.model." + name.removesuffix(".weight")
        factors[f"{prefix}.lora_A.weight"] = torch.randn(4, 512, generator=generator)
        factors[f"{prefix}.lora_B.weight"] = torch.randn(512, 4, generator=generator)
    save_file(factors, folder / "adapter_model.safetensors")
    config = {"peft_type": "LORA", "r": 4, "lora_alpha": 4, "target_modules": ["up_proj"], "bias": "none"}
    (folder / "adapter_config.json").write_text(json.dumps(config))
    return folder


def load(folder: Path) -> dict[str, torch.Tensor]:
    """All tensors of a model folder."""
    return {name: t for file in sorted(folder.glob("*.safetensors")) for name, t in load_file(file).items()}


@pytest.fixture
def load_model() -> Callable[[Path], dict[str, torch.Tensor]]:
    return load


def contents(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


@pytest.fixture
def read_folder() -> Callable[[Path], dict[str, bytes]]:
    """Name → bytes of every file in a folder, hidden ones included."""
    return contents


@dataclass(frozen=True)
class Ran:
    code: int
    out: str
    err: str


@pytest.fixture
def ah(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Callable[..., Ran]:
    """Runs `ah …` in this process, as its entry point does."""

    def run(*words: object) -> Ran:
        for console in (output.out, output.err):
            console.cache_clear()  # they hold the streams of the test before
        monkeypatch.setattr("sys.argv", ["ah", *map(str, words)])
        monkeypatch.setenv("COLUMNS", "200")
        code = 0
        try:
            main()
        except SystemExit as end:
            code = int(end.code or 0)
        captured = capsys.readouterr()
        return Ran(code, captured.out, captured.err)

    return run
