"""Advice before the first step: each rule with its reason."""

from __future__ import annotations

import pytest

from adapterhub.trainers import DataSource, TrainConfig
from adapterhub.trainers.checks import Facts, advise

FACTS = Facts(trained_tokens=1000, lora_parameters=10_000, expected_rate=2e-4, max_positions=4096)


@pytest.mark.parametrize(
    ("keys", "words"),
    [
        ({"learning_rate": 2e-5}, "far below what suits LoRA on this base, about 0.0002: whole models"),
        ({"learning_rate": 5e-3}, "far above what suits LoRA on this base, about 0.0002"),
        ({"learning_rate": 3e-5}, ""),
        ({"learning_rate": 2e-3}, ""),
        ({"train_on_inputs": True}, "the prompts are learnt too"),
        ({"sequence_len": 8192}, "beyond the base's 4096 positions"),
        ({"lora_target_modules": ("q_proj", "v_proj"), "task": "domain"}, "the MLP layers are left out"),
        ({"lora_target_modules": ("q_proj", "v_proj"), "task": "style"}, ""),
        ({}, ""),
    ],
)
def test_what_is_unwise_is_said(keys: dict[str, object], words: str) -> None:
    config = TrainConfig(base_model="x", datasets=(DataSource(path="a"),), **keys)  # type: ignore[arg-type]
    found = advise(config, FACTS)
    assert len(found) == bool(words)
    assert words in "".join(found)


def test_a_rank_below_what_the_data_holds_is_said() -> None:
    config = TrainConfig(base_model="x", datasets=(DataSource(path="a"),))
    (found,) = advise(config, Facts(trained_tokens=20_000, lora_parameters=10_000, expected_rate=2e-4))
    assert "10,000 parameters for 20,000 trained tokens" in found
