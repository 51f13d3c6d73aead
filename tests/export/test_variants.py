"""Every variant of LoRA that PEFT saves answers after the export as it did before, or is refused with a reason."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from lora_configurations import KINDS, LLAMA, Configuration, compare, random_configuration
from safetensors.torch import load_file, save_file

from adapterhub.base import find_base
from adapterhub.errors import IntegrityError, Unsupported
from adapterhub.export import plan_export
from adapterhub.export.certificate import certify

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


TIED: dict[str, tuple[str, dict[str, Any], bool]] = {  # base, LoraConfig, whether the head stays tied
    "factors": ("llama", {"target_modules": ["embed_tokens", "lm_head"]}, True),
    "factors, named once": ("gemma2", {"target_modules": ["lm_head"]}, True),
    "another scale": (
        "llama",
        {"target_modules": ["lm_head"], "alpha_pattern": {"lm_head": 3}, "rank_pattern": {"lm_head": 5}},
        False,
    ),
    "dora": ("gemma2", {"target_modules": ["embed_tokens"], "use_dora": True}, False),
    "saved": ("llama", {"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]}, True),
    "saved, whose name PEFT does not see": ("gpt2", {**CONV1D, "modules_to_save": ["wte"]}, False),
    "factors, whose name PEFT does not see": ("gpt2", {**CONV1D, "target_modules": ["wte"]}, False),
}


@pytest.mark.parametrize("case", TIED)
def test_ensured_weight_tying(case: str, tmp_path: Path) -> None:
    kind, lora, stays = TIED[case]
    outcome = compare(Configuration(kind, {"r": 2, **lora, "ensure_weight_tying": True}, tied=True), tmp_path)
    assert outcome is not None
    assert not outcome.refused
    assert outcome.error <= 1e-5
    assert outcome.change > 1e-3
    assert json.loads((tmp_path / "out" / "config.json").read_text())["tie_word_embeddings"] is stays


def test_tied_factors_that_peft_forgets_are_refused(tmp_path: Path) -> None:
    """PEFT trains and saves them, and loads the adapter without: its logits were 0.2 from the trained model's."""
    lora = {**CONV1D, "target_modules": ["wte", "lm_head"], "ensure_weight_tying": True}
    outcome = compare(Configuration("gpt2", lora, tied=True), tmp_path)
    assert outcome is not None
    assert "PEFT drops" in outcome.refused


def test_tied_factors_that_differ_are_refused(tmp_path: Path) -> None:
    lora = {"r": 2, "target_modules": ["embed_tokens", "lm_head"], "ensure_weight_tying": True}
    assert compare(Configuration("llama", lora, tied=True), tmp_path) is not None
    file = tmp_path / "adapter" / "adapter_model.safetensors"
    tensors = load_file(file)
    tensors["base_model.model.lm_head.lora_A.weight"] += 1
    save_file(tensors, file)
    with pytest.raises(Unsupported, match="they differ"):
        plan_export(tmp_path / "adapter", find_base(str(tmp_path / "base")), tmp_path / "new")


TOKENS: dict[str, tuple[dict[str, Any], int | None, bool]] = {  # LoraConfig, resized, whether a tied base stays tied
    "a list": ({"trainable_token_indices": [5, 1]}, None, True),
    "new ones": ({"trainable_token_indices": [5, 68]}, 70, True),
    "of both, alike": ({"trainable_token_indices": {"embed_tokens": [1, 5], "lm_head": [1, 5]}}, None, True),
    "of both, others": ({"trainable_token_indices": {"embed_tokens": [1, 5], "lm_head": [1, 6, 7]}}, None, False),
    "of the head": ({"trainable_token_indices": {"lm_head": [1, 6]}}, None, False),
    "and factors on the head": ({"trainable_token_indices": [1, 5], "target_modules": ["lm_head"]}, None, False),
}


@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
@pytest.mark.parametrize("case", TOKENS)
def test_trainable_tokens(case: str, tied: bool, tmp_path: Path) -> None:
    lora, resized, stays = TOKENS[case]
    outcome = compare(
        Configuration("llama", {"r": 2, "target_modules": ["q_proj"], **lora}, tied=tied, resized=resized), tmp_path
    )
    assert outcome is not None
    assert not outcome.refused
    assert outcome.error <= 1e-5
    assert outcome.change > 1e-3
    assert json.loads((tmp_path / "out" / "config.json").read_text())["tie_word_embeddings"] is (tied and stays)


BROKEN_TOKENS: dict[str, tuple[Any, str]] = {
    "twice": ([3, 3], "a token twice"),
    "beyond the vocabulary": ([1, 64], "does not have"),
    "negative": ([1, -1], "does not have"),
    "more than the file has": ([1, 2, 3], "3 tokens"),
    "none": (None, "do not agree"),
    "of another module": ({"norm": [1, 2]}, "0 tokens"),
}


@pytest.fixture(scope="module")
def with_tokens(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tokens")
    lora = {"r": 2, "target_modules": ["q_proj"], "trainable_token_indices": [1, 5]}
    assert compare(Configuration("llama", lora), folder) is not None
    return folder


@pytest.mark.parametrize("case", BROKEN_TOKENS)
def test_broken_tokens_are_refused(case: str, with_tokens: Path, tmp_path: Path) -> None:
    indices, told = BROKEN_TOKENS[case]
    adapter = shutil.copytree(with_tokens / "adapter", tmp_path / "adapter")
    config = json.loads((adapter / "adapter_config.json").read_text())
    (adapter / "adapter_config.json").write_text(json.dumps(config | {"trainable_token_indices": indices}))
    with pytest.raises(Unsupported, match=told):
        plan_export(adapter, find_base(str(with_tokens / "base")), tmp_path / "out")


def test_a_token_that_changed_after_the_merge_is_found(with_tokens: Path, tmp_path: Path) -> None:
    """The certificate compares every value of a tensor with new rows."""
    plan = plan_export(with_tokens / "adapter", find_base(str(with_tokens / "base")), tmp_path / "out")
    copied = shutil.copytree(with_tokens / "out", tmp_path / "copied")
    assert certify(plan, copied).saved == 1
    operation = next(op for op in plan.operations if op.tokens)
    with (copied / "model.safetensors").open("r+b") as file:
        file.seek(operation.start + 5 * 4 * operation.source.shape[1])
        file.write(b"\0\0\0\x3f")
    with pytest.raises(IntegrityError, match="embed_tokens"):
        certify(plan, copied)


@pytest.mark.parametrize("seed", range(12))
def test_a_random_configuration(seed: int, tmp_path: Path) -> None:
    outcome = compare(random_configuration(seed), tmp_path)
    if outcome is not None and not outcome.refused:
        assert outcome.error <= 1e-5
