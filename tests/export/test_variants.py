"""Every variant of LoRA that PEFT saves answers after the export as it did before, or is refused with a reason."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from lora_configurations import KINDS, LLAMA, Configuration, compare, random_configuration

pytestmark = pytest.mark.slow

LLAMA_ALL = {"r": 2, "target_modules": list(LLAMA)}
CONV1D: dict[str, Any] = {"r": 2, "target_modules": list(KINDS["gpt2"].linear), "fan_in_fan_out": True}
EXPORTED: dict[str, tuple[str, dict[str, Any]]] = {
    "dora": ("llama", {**LLAMA_ALL, "use_dora": True}),
    "dora on Conv1D": ("gpt2", {**CONV1D, "use_dora": True}),
    "all biases": ("qwen2", {**LLAMA_ALL, "bias": "all"}),
    "biases of adapted layers": ("qwen2", {"r": 2, "target_modules": ["q_proj", "v_proj"], "bias": "lora_only"}),
    "lora_bias and biases": ("qwen2", {"r": 2, "target_modules": ["q_proj"], "lora_bias": True, "bias": "all"}),
    "modules to save": ("gpt2", {**CONV1D, "target_modules": ["c_attn"], "modules_to_save": ["ln_f", "mlp"]}),
}


@pytest.mark.parametrize("case", EXPORTED)
def test_logits(case: str, tmp_path: Path) -> None:
    kind, lora = EXPORTED[case]
    outcome = compare(Configuration(kind, lora), tmp_path)
    assert outcome is not None
    assert not outcome.refused
    assert outcome.error <= 1e-5
    assert outcome.change > 1e-3


ENDS: dict[str, tuple[dict[str, Any], int | None, bool]] = {  # LoraConfig, resized, whether a tied base stays tied
    "a norm": ({"modules_to_save": ["norm"]}, None, True),
    "the saved head": ({"modules_to_save": ["lm_head"]}, None, False),
    "the saved embedding": ({"modules_to_save": ["embed_tokens"]}, None, False),
    "both saved": ({"modules_to_save": ["embed_tokens", "lm_head"]}, None, False),
    "factors on the embedding": ({"target_modules": ["embed_tokens"]}, None, False),
    "factors on the head": ({"target_modules": ["lm_head"]}, None, False),
    "factors on both": ({"target_modules": ["embed_tokens", "lm_head"]}, None, False),
    "dora on both": ({"target_modules": ["embed_tokens", "lm_head"], "use_dora": True}, None, False),
    "more tokens": ({}, 70, True),
    "fewer tokens": ({}, 60, True),
    "more tokens, saved head": ({"modules_to_save": ["lm_head"]}, 70, False),
    "more tokens, factors on both": ({"target_modules": ["embed_tokens", "lm_head"]}, 70, False),
}


@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
@pytest.mark.parametrize("case", ENDS)
def test_embedding_and_head(case: str, tied: bool, tmp_path: Path) -> None:
    lora, resized, stays = ENDS[case]
    outcome = compare(
        Configuration("llama", {"r": 2, "target_modules": ["q_proj"], **lora}, tied=tied, resized=resized), tmp_path
    )
    assert outcome is not None
    assert not outcome.refused
    assert outcome.error <= 1e-5
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["tie_word_embeddings"] is (tied and stays)
    assert config["vocab_size"] == (resized or 64)
    certificate = json.loads((tmp_path / "out" / "export.json").read_text())
    assert certificate["merged"]["planned"] == certificate["merged"]["applied"] > 0
    assert certificate["saved"] > 0


REFUSED: dict[str, tuple[dict[str, Any], int | None, str]] = {
    "trainable tokens": ({"trainable_token_indices": [1, 5]}, None, "trainable tokens"),
    "resized without its head": ({"target_modules": ["embed_tokens"]}, 70, "has 70 rows, lm_head.weight has 64"),
    "lora_bias without a bias": ({"lora_bias": True}, None, "no bias for"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_refused(case: str, tmp_path: Path) -> None:
    lora, resized, told = REFUSED[case]
    outcome = compare(Configuration("llama", {"r": 2, "target_modules": ["q_proj"], **lora}, resized=resized), tmp_path)
    assert outcome is not None
    assert told in outcome.refused
    assert not (tmp_path / "out").exists()


def test_shared_factors_of_a_tied_base_are_refused(tmp_path: Path) -> None:
    """GPT-2's export differed from PEFT by 0.2 in its logits."""
    lora = {**CONV1D, "target_modules": ["wte", "lm_head"], "ensure_weight_tying": True}
    outcome = compare(Configuration("gpt2", lora, tied=True), tmp_path)
    assert outcome is not None
    assert "ensure_weight_tying" in outcome.refused


@pytest.mark.parametrize("seed", range(12))
def test_a_random_configuration(seed: int, tmp_path: Path) -> None:
    outcome = compare(random_configuration(seed), tmp_path)
    if outcome is not None and not outcome.refused:
        assert outcome.error <= 1e-5
