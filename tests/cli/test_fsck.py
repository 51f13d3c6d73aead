"""`ah fsck` as it is typed."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

Ah = Callable[..., Any]


@pytest.fixture
def published(ah: Ah, adapter_factory: Callable[..., Path]) -> Ah:
    assert ah("publish", adapter_factory(), "--name", "acme/support", "--channel", "prod").code == 0
    return ah


def test_a_sound_registry_exits_with_0(published: Ah) -> None:
    for words in ((), ("acme",), ("acme/support",)):
        done = published("fsck", *words)
        assert (done.code, done.out) == (0, "")
        assert "1 adapters, 1 versions, 2 files" in done.err
    report = published("fsck", "--json").json
    assert (report["versions"], report["problems"]) == (1, [])


def test_a_broken_one_exits_with_1_and_says_what_to_do(published: Ah) -> None:
    weights = max(
        (Path(os.environ["AH_HOME"]) / "registry" / "t").rglob("blobs/sha256/*/*"), key=lambda p: p.stat().st_size
    )
    weights.write_bytes(b"x" + weights.read_bytes()[1:])
    done = published("fsck")
    assert done.code == 1
    assert done.out.startswith("acme/support@1 adapter_model.safetensors: ")
    assert "next: " in done.out
    assert published("fsck", "--json").json["problems"][0]["where"] == "acme/support@1 adapter_model.safetensors"


def test_what_is_not_there_is_said(published: Ah) -> None:
    for words in ("nobody", "acme/nothing", "Acme"):
        done = published("fsck", words)
        assert (done.code, done.out) == (2, "")
