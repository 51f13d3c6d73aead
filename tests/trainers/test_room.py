"""Too little memory is said before the first step, with the cheapest settings that fit."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from adapterhub.trainers import DataSource, TrainConfig
from adapterhub.trainers.planning.memory import GB
from adapterhub.trainers.room import Room, room, too_little

LLAMA = json.loads((Path(__file__).parent / "bases" / "llama-3-8b.json").read_text())
CONFIG = TrainConfig(base_model="llama", datasets=(DataSource(path="train.jsonl"),), sequence_len=2048)


@pytest.mark.parametrize(
    ("free", "gpu", "words"),
    [
        (80, True, None),
        (64, False, None),
        (12, True, "adapter: qlora"),
        (12, False, "this machine has 12.0 GB free"),
        (2, True, "take a smaller base"),
    ],
)
def test_a_warning_says_what_is_needed_and_what_fits(free: int, gpu: bool, words: str | None) -> None:
    config = replace(CONFIG, sequence_len=512) if not gpu else CONFIG
    found = too_little(config, LLAMA, Room(free * GB, gpu=gpu))
    if words is None:
        assert found is None
    else:
        assert found is not None
        assert found.startswith("about ")
        assert words in found


def test_nothing_is_said_of_what_cannot_be_planned() -> None:
    assert too_little(CONFIG, {"model_type": "unknown"}, Room(1)) is None
    assert too_little(CONFIG, LLAMA, None) is None


def test_this_machine_has_some_memory() -> None:
    found = room()
    assert found is None or found.free > 2**20


def test_the_plan_says_whether_this_machine_has_room(ah: Callable[..., Any], write_config: Callable[..., Path]) -> None:
    found = ah("plan", write_config())
    assert found.code == 0
    assert "has free" in found.err or "too little memory" in found.err
