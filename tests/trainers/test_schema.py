"""The JSON Schema knows what the reader knows, and says it to editors."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from jsonschema import Draft202012Validator

from adapterhub.trainers.dialect import keys, meanings
from adapterhub.trainers.dialect.schema import schema

FILES = sorted((Path(__file__).parent / "axolotl").glob("*.yml"))
SMALLEST = "base_model: x\ndatasets: [{path: train.jsonl}]\n"
Ah = Callable[..., Any]


@pytest.fixture(scope="module")
def validator() -> Draft202012Validator:
    made = schema()
    Draft202012Validator.check_schema(made)
    return Draft202012Validator(made)


def complaints(validator: Draft202012Validator, text: str) -> list[str]:
    return [error.message for error in validator.iter_errors(yaml.safe_load(text))]


@pytest.mark.parametrize("file", FILES, ids=lambda f: f.stem)
def test_files_that_people_have_are_valid(validator: Draft202012Validator, file: Path) -> None:
    found = complaints(validator, file.read_text())
    assert [f for f in found if "context_parapllel_size" not in f] == []
    assert bool(found) == ("typo" in file.stem)


@pytest.mark.parametrize(
    "lines",
    [
        "lora_r: 8\nlora_alpha:\nlearning_rate: 2e-4\nsave_strategy: no\nbf16: auto",
        "wandb_watch: all\nwandb_project: x\nliger_rope: true\ncomet_x: 1",
        "peft_use_dora: false\npretraining_dataset:\ntokens: []",
        "adapterhub: {name: acme/support, task: style, labels: {a: b}}",
        "test_datasets: [{path: a, type: {field_instruction: q, format: '{instruction}'}}, {path: b, type: alpaca}]",
        "rl: dpo\ntest_datasets: [{path: a, type: {field_prompt: q, field_chosen: c, field_rejected: r}}]",
        "deepspeed: {zero_optimization: {stage: 3}}\nfsdp: full_shard auto_wrap",
        "chat_template: tokenizer_default_fallback_chatml\nspecial_tokens: {pad_token: x}\neot_tokens: [x]",
        "lora_target_modules: .*proj\nlora_rank_pattern: {q_proj: 8}\npeft_layers_to_transform: [0, 1]",
        "optimizer: sgd\noptim_args: {momentum: 0.9}\nreport_to: [wandb, none]",
    ],
)
def test_what_the_reader_takes_is_valid(validator: Draft202012Validator, lines: str) -> None:
    assert complaints(validator, SMALLEST + lines) == []


@pytest.mark.parametrize(
    "lines",
    [
        "lora_rr: 8", "lora_r: many", "lora_r: 0", "lora_r: true", "lora_dropout: 1.5", "learning_rate: fast",
        "optimizer: muon", "adapter: dora", "lora_target_modules: []", "save_strategy: best", "max_steps: 0",
        "lora_rank_pattern: {q_proj: 0}", "peft_layers_to_transform: [-1]", "lora_modules_to_save: [x]",
        "pretraining_dataset: x", "test_datasets: [{path: a, type: alpacca}]", "test_datasets: [{type: alpaca}]",
        "test_datasets: [{path: a, roles_to_train: [gpt]}]", "adapterhub: {nam: a}", "fsdp: [full]",
        "chat_template: lama3", "bnb_config_kwargs: {x: 1}", "wandb_project: 3", "train_on_inputs: 3",
        "test_datasets: [{path: a, type: {formt: x}}]", "deepspeed: 3",
    ],
)  # fmt: skip
def test_what_the_reader_refuses_is_not(validator: Draft202012Validator, lines: str) -> None:
    assert complaints(validator, SMALLEST + lines)


def test_a_config_without_base_or_data_is_not_valid(validator: Draft202012Validator) -> None:
    assert len(complaints(validator, "lora_r: 8")) == 2


def test_every_key_has_a_meaning_and_every_meaning_a_key() -> None:
    assert set(meanings.KEYS) == {*keys.KEYS, "datasets", "test_datasets", "adapterhub"}
    assert set(meanings.SOURCE) == set(keys.SOURCE_KEYS)
    assert set(meanings.USER_FORMAT) == {*keys.USER_FORMAT_KEYS, *keys.USER_PREFERENCE_KEYS}
    assert set(meanings.BLOCK) == set(keys.BLOCK_KEYS)


def test_defaults_are_the_config_s() -> None:
    found = schema()["properties"]
    assert (found["lora_r"]["default"], found["lora_alpha"]["default"], found["lr_scheduler"]["default"]) == (
        16, 32, "cosine",
    )  # fmt: skip
    assert "default" not in found["max_steps"]


def test_the_schema_is_printed_or_written(ah: Ah, tmp_path: Path) -> None:
    printed = ah("config", "schema")
    assert json.loads(printed.out) == schema()
    file = tmp_path / "schema.json"
    written = ah("config", "schema", "--out", file)
    assert json.loads(file.read_text()) == schema()
    assert f"# yaml-language-server: $schema={file}" in written.err
    assert ah("config", "schema", "--out", tmp_path / "none" / "x").code == 2


@pytest.mark.parametrize(
    ("key", "lines"),
    [
        ("lora_r", ["lora_r: Rank", "takes: a whole number from 1 to 512", "default: 16"]),
        ("task", ["takes: one of style, domain, reasoning, full"]),
        ("datasets.train_on_eos", ["takes: one of turn, all, last, none", "default: turn"]),
        ("lora_target_modules", ["takes: text or a list of text"]),
        ("plugins", ["Without effect here"]),
        ("learning_rate", ["takes: a number above 0 to 1"]),
    ],
)
def test_a_key_is_explained(ah: Ah, key: str, lines: list[str]) -> None:
    found = ah("config", "explain", key)
    assert found.code == 0
    for line in lines:
        assert line in found.out


def test_an_unknown_key_is_explained_by_the_likely_one(ah: Ah) -> None:
    for typed, meant in (("lora_rr", "lora_r"), ("per_device_train_batch_size", "micro_batch_size")):
        found = ah("config", "explain", typed)
        assert (found.code, f"did you mean {meant}?" in found.err) == (2, True)
    assert json.loads(ah("config", "explain", "lora_r", "--json").out)["default"] == 16
