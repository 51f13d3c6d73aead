"""What is trained on is what serving will send: templates, special tokens, tokenizers and ends of turns."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from adapterhub.errors import ConfigError
from adapterhub.trainers import Prepared, prepare, read_config, read_yaml

Writer = Callable[..., Path]
USER, ANSWER = {"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Ahoy"}
WITH_EOS = "{% for m in messages %}{{ m.role }}: {{ m.content }}{{ eos_token }}\n{% endfor %}"


@pytest.fixture
def prepared(write_config: Writer) -> Callable[..., Prepared]:
    def make(**keys: Any) -> Prepared:
        path = write_config(**keys)
        return prepare(read_config(read_yaml(path)).config, beside={"datasets": path.parent, "config": path.parent})

    return make


def texts(found: Prepared) -> list[str]:
    return sorted(found.tokenizer.decode(example.input_ids) for example in found.train.examples)


def test_a_special_token_that_the_template_writes_is_refused(prepared: Callable[..., Prepared]) -> None:
    keys = {"chat_template": "jinja", "chat_template_jinja": WITH_EOS}
    with pytest.raises(ConfigError) as caught:
        prepared(**keys, special_tokens={"eos_token": "<|im_start|>"})
    assert "the chat template writes eos_token, which is <|im_start|> in training and <|im_end|> in serving" in str(
        caught.value
    )
    assert "write <|im_start|> itself" in caught.value.hint
    assert prepared(**keys, special_tokens={"eos_token": "<|im_end|>", "pad_token": "<|im_start|>"})
    assert prepared(special_tokens={"eos_token": "<|im_start|>"})  # the template writes none


def test_pad_as_the_end_token_takes_no_end_from_the_labels(prepared: Callable[..., Prepared]) -> None:
    found = prepared(special_tokens={"pad_token": "<|im_end|>"})
    assert found.tokenizer.pad_token_id == found.tokenizer.eos_token_id
    assert all(example.labels[-1] == found.tokenizer.eos_token_id for example in found.train.examples)


def test_another_tokenizer_must_have_the_same_words(
    prepared: Callable[..., Prepared], tiny_base: Path, tmp_path: Path
) -> None:
    other = tmp_path / "tokenizer"
    other.mkdir()
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(tiny_base / name, other)
    (other / "chat_template.jinja").write_text("{% for m in messages %}{{ m.content }}<|im_end|>{% endfor %}")
    found = prepared(tokenizer_config=str(other))
    assert found.template == (other / "chat_template.jinja").read_text()
    assert texts(found)[0] == "Say 0.<|im_end|>Ahoy, 0!<|im_end|>"
    words = json.loads((other / "tokenizer.json").read_text())
    words["model"]["vocab"]["zz"] = len(words["model"]["vocab"]) + 50
    (other / "tokenizer.json").write_text(json.dumps(words))
    with pytest.raises(ConfigError, match="has other words than the base"):
        prepared(tokenizer_config=str(other))


def test_a_named_template_needs_its_tokens_and_travels(prepared: Callable[..., Prepared]) -> None:
    with pytest.raises(ConfigError, match=r"has no token <\|begin_of_text\|> for llama3") as caught:
        prepared(chat_template="llama3")
    assert "take chat_template out" in caught.value.hint
    assert prepared(chat_template="tokenizer_default_fallback_llama3").template == prepared().template
    assert prepared(chat_template="qwen3").template == prepared().template
    alpaca = prepared(chat_template="alpaca")
    assert texts(alpaca)[0] == "### Instruction:\nSay 0.\n\n### Response:\nAhoy, 0!<|im_end|>"
    assert alpaca.template is not None
    assert "### Response" in alpaca.template


def test_the_end_of_a_turn_must_be_a_token_that_the_template_writes(prepared: Callable[..., Prepared]) -> None:
    assert prepared(eot_tokens=["<|im_end|>"])
    for token, what in (("<|eot_id|>", "has no token '<|eot_id|>'"), ("<|im_start|>", "ends a turn with <|im_end|>")):
        with pytest.raises(ConfigError) as caught:
            prepared(eot_tokens=[token])
        assert what in caught.value.what


def test_a_system_message_is_given_to_those_without(prepared: Callable[..., Prepared]) -> None:
    own = {"messages": [{"role": "system", "content": "Be brief."}, USER, ANSWER]}
    found = texts(prepared(rows=[own, {"messages": [USER, ANSWER]}], default_system_message="Be kind."))
    assert ["Be kind." in text for text in found] == [False, True]
    assert ["Be brief." in text for text in found] == [True, False]


def test_rows_that_are_there_already_are_left_out_where_asked(
    prepared: Callable[..., Prepared], write_rows: Writer
) -> None:
    rows = [{"messages": [USER, {**ANSWER, "content": f"Ahoy {i % 3}"}]} for i in range(9)]
    tests = [{"path": str(write_rows([*rows[:2], {"messages": [USER, ANSWER]}], name="test.jsonl"))}]
    kept = prepared(rows=rows, test_datasets=tests)
    distinct = prepared(rows=rows, test_datasets=tests, dataset_exact_deduplication=True)
    assert (len(kept.train.examples), len(distinct.train.examples)) == (9, 3)
    assert kept.evaluation is not None
    assert distinct.evaluation is not None
    assert (len(kept.evaluation.examples), len(distinct.evaluation.examples)) == (3, 1)
    twice = prepared(
        rows=rows, datasets=[{"path": "train.jsonl"}, {"path": "train.jsonl"}], dataset_exact_deduplication=True
    )
    assert len(twice.train.examples) == 3


@pytest.mark.slow
def test_an_end_that_the_base_does_not_stop_at_goes_with_the_adapter(
    ah: Callable[..., Any], write_config: Writer, tiny_base: Path, tmp_path: Path
) -> None:
    base = tmp_path / "base"
    base.mkdir()
    for file in tiny_base.iterdir():
        if file.name != "tokenizer_config.json":
            (base / file.name).symlink_to(file)
    settings = json.loads((tiny_base / "tokenizer_config.json").read_text()) | {"eos_token": "<|unused|>"}
    (base / "tokenizer_config.json").write_text(json.dumps(settings))
    config = json.loads((base / "config.json").read_text())
    (base / "config.json").unlink()
    (base / "config.json").write_text(json.dumps(config | {"eos_token_id": config["vocab_size"] - 4}))
    (base / "generation_config.json").write_text(json.dumps({"temperature": 0.5, "eos_token_id": 256}))
    done = ah("train", write_config(base_model=str(base), max_steps=1))
    assert done.code == 0, done.err
    assert "an answer ends with <|im_end|>, where the base does not stop by itself" in done.err
    kept = json.loads((tmp_path / "run/adapter/generation_config.json").read_text())
    assert kept == {"temperature": 0.5, "eos_token_id": [256, 259]}
