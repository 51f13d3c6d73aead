"""Stores and registries of every kind, and drafts that need no adapter: the rules do not look into files."""

from __future__ import annotations

import hashlib
import itertools
from collections.abc import Callable
from pathlib import Path

import pytest

from adapterhub.manifest import FileEntry, LoraShape, Manifest, Verdict, Verdicts
from adapterhub.refs import AdapterName
from adapterhub.registry import Draft, ObjectRegistry, Store
from adapterhub.registry.local import LocalStore
from adapterhub.registry.memory import MemoryStore

NAME = AdapterName("acme", "support")
Drafts = Callable[..., Draft]


@pytest.fixture(params=["memory", "local"])
def store(request: pytest.FixtureRequest, tmp_path: Path) -> Store:
    """Every backend runs every test that asks for a store."""
    return MemoryStore() if request.param == "memory" else LocalStore(tmp_path / "registry")


@pytest.fixture
def registry(store: Store) -> ObjectRegistry:
    return ObjectRegistry(store)


@pytest.fixture
def name() -> AdapterName:
    return NAME


@pytest.fixture
def new_draft(tmp_path: Path) -> Drafts:
    """Makes drafts of two small files: the same text, the same digest."""
    numbers = itertools.count()

    def make(text: str | None = None) -> Draft:
        number = next(numbers)
        return write_draft(tmp_path / "drafts" / str(number), text=text or f"content {number}")

    return make


def write_draft(folder: Path, *, text: str) -> Draft:
    folder.mkdir(parents=True)
    contents = {"adapter_config.json": b"{}", "adapter_model.safetensors": text.encode()}
    for file, content in contents.items():
        (folder / file).write_bytes(content)
    files = tuple(FileEntry(f, len(c), hashlib.sha256(c).hexdigest()) for f, c in contents.items())
    shape = LoraShape(rank=4, alpha=8, target_modules=("q_proj",), parameters=1, dtype="F32")
    yes = Verdict("yes")
    return Draft(folder, Manifest(files=files, lora=shape), Verdicts(yes, yes, yes))
