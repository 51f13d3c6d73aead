from __future__ import annotations

import json
from typing import Any

import pytest

from adapterhub.registry.clean import clean


def cleaned(config: dict[str, Any]) -> dict[str, Any]:
    result: dict[str, Any] = json.loads(clean(config))
    return result


@pytest.mark.parametrize(
    ("base", "kept"),
    [
        ("/home/ana/models/SmolLM2", "SmolLM2"),
        ("/home/ana/models/SmolLM2/", "SmolLM2"),
        ("./models/SmolLM2", "SmolLM2"),
        ("~/models/SmolLM2", "SmolLM2"),
        ("file:///home/ana/SmolLM2", "SmolLM2"),
        ("C:\\Users\\ana\\SmolLM2", "SmolLM2"),
        ("HuggingFaceTB/SmolLM2-135M-Instruct", "HuggingFaceTB/SmolLM2-135M-Instruct"),
        ("/", None),
    ],
)
def test_the_base_keeps_its_name_without_the_machine(base: str, kept: str | None) -> None:
    assert cleaned({"base_model_name_or_path": base})["base_model_name_or_path"] == kept


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("token", "anything"),
        ("hub_token", "anything"),
        ("api_key", "anything"),
        ("aws_secret", "anything"),
        ("password", "anything"),
        ("note", "hf_" + "a" * 34),
        ("note", "my key is sk-" + "a" * 40),
        ("note", "AKIA" + "A" * 16),
        ("note", "ghp_" + "a" * 36),
        ("note", "-----BEGIN RSA PRIVATE KEY-----"),
        ("proxy", "https://ana:pass@example.org/"),
        ("cache_dir", "/home/ana/.cache"),
        ("log", "\\\\server\\share"),
    ],
)
def test_secrets_and_paths_are_taken_out_at_any_depth(key: str, value: str) -> None:
    for config in ({key: value}, {"a": {key: value}}, {"a": [{key: value}]}, {key: [value]}):
        text = clean(config).decode()
        assert json.dumps(value)[1:-1] not in text
        assert f'"{key}"' in text


def test_what_peft_needs_stays() -> None:
    config = {
        "peft_type": "LORA",
        "r": 8,
        "target_modules": ["q_proj", "v_proj"],
        "alora_invocation_tokens": [1, 2],
        "trainable_token_indices": None,
        "rank_pattern": {"layers.0.q_proj": 4},
        "tokenizer": "org/model",
        "modules_to_save": None,
        "use_rslora": True,
        "revision": None,
        "unknown_field": {"x": "y/z", "url": "https://example.org/a"},
    }
    assert cleaned(config) == config


def test_equal_configs_have_equal_bytes() -> None:
    assert clean({"a": 1, "b": 2}) == clean({"b": 2, "a": 1})
