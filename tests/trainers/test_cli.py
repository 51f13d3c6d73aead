"""`ah train`: what is printed, and what bad input leaves behind: nothing."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

Writer = Callable[..., Path]
Ah = Callable[..., Any]


def test_check_prints_the_fate_of_each_key_and_touches_nothing(ah: Ah, write_config: Writer, tmp_path: Path) -> None:
    config = write_config(base_model="no/such-base", flash_attention=True, comet_project_name="x")
    found = ah("train", config, "--check")
    assert found.code == 0
    assert "approximated" in next(line for line in found.out.splitlines() if line.startswith("flash_attention"))
    assert "without effect" in next(line for line in found.out.splitlines() if line.startswith("comet_project_name"))
    keys = {entry["key"]: entry["fate"] for entry in json.loads(ah("train", config, "--check", "--json").out)["keys"]}
    assert keys["lora_r"] == "honoured"
    assert not (tmp_path / "run").exists()


def test_show_labels_marks_what_is_trained_on(ah: Ah, write_config: Writer, tmp_path: Path) -> None:
    found = ah("train", write_config(), "--show-labels", 2)
    assert found.code == 0
    assert found.out.count("⟦Ahoy, ") == 2
    assert found.out.count("!<|im_end|>⟧") == 2
    pieces = json.loads(ah("train", write_config(), "--show-labels", 1, "--json").out)[0]["pieces"]
    assert [piece["trained"] for piece in pieces] == [False, True]
    assert not (tmp_path / "run").exists()


@pytest.mark.slow
def test_training_from_flags_ends_with_the_next_command(
    ah: Ah, write_config: Writer, tmp_path: Path, tiny_base: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_config()
    monkeypatch.chdir(tmp_path)
    flags = ("--base", tiny_base, "--data", "train.jsonl", "--eval-data", "train.jsonl", "--max-steps", 2)
    found = ah("train", *flags, "--rank", 2, "--batch", 4, "--out", "runs/a", "--name", "acme/support")
    assert found.code == 0
    assert found.out == ""
    assert found.err.splitlines()[-1] == "next:   ah publish runs/a"
    assert "evaluation loss" in found.err
    again = ah("train", "runs/a/config.yml", "--out", "runs/b", "--json")
    assert again.code == 0
    answer = json.loads(again.out)
    assert (answer["run"], answer["name"], answer["steps"]) == ("runs/b", "acme/support", 2)
    first, second = (Path(f"runs/{run}/adapter/adapter_model.safetensors").read_bytes() for run in "ab")
    assert first == second
    taken = ah("train", "runs/a/config.yml", "--out", "runs/b")
    assert (taken.code, "runs/b is not empty" in taken.err) == (2, True)


@pytest.mark.parametrize(
    ("change", "what"),
    [
        ({"lora_rr": 4}, "did you mean lora_r?"),
        ({"lora_r": "x"}, "lora_r expects a whole number"),
        ({"peft_use_dora": True}, "cannot be served"),
        ({"resume_from_checkpoint": "out/checkpoint-8"}, "a run goes on with: ah train --resume RUN"),
        ({"rl": "dpo"}, "no preferences, the row has messages"),
        ({"datasets": [{"path": "none.jsonl"}]}, "none.jsonl was not found"),
        ({"base_model": "./none"}, "'./none' was not found"),
        ({"rows": [{"messages": [{"role": "user", "content": "Hi"}]}]}, "train.jsonl:1: messages has no assistant"),
        ({"sequence_len": 8}, "is left to train on"),
        ({"val_set_size": 12}, "leaves nothing to train on"),
        ({"lora_target_modules": ["w1"]}, "has no layer 'w1'"),
        ({"lora_target_modules": "all"}, "no layer of the base tiny-llama matches 'all'"),
        ({"datasets": "train.jsonl"}, "datasets expects a list like `- path: train.jsonl`"),
        ({"datasets": ["train.jsonl"]}, "datasets expects a list like `- path: train.jsonl`"),
        ({"peft_layers_to_transform": [0, 7]}, "has no layer 7"),
        ({"special_tokens": {"pad_token": "<none>"}}, "has no token '<none>'"),
        ({"chat_template": "jinja", "chat_template_jinja": "none.jinja"}, "none.jinja cannot be read"),
        ({"chat_template": "jinja", "chat_template_jinja": "{{ raise_exception('no') }}"}, "refuses this conversation"),
        ({"chat_template": "jinja", "chat_template_jinja": "{{ nope("}, "refuses this conversation"),
        ({"adapterhub": {"name": "../../etc"}}, "is not a tenant name"),
    ],
)
def test_bad_input_exits_with_2_and_leaves_nothing(
    ah: Ah, write_config: Writer, tmp_path: Path, change: dict[str, Any], what: str
) -> None:
    config = write_config(**change)
    before = sorted(tmp_path.rglob("*"))
    found = ah("train", config)
    assert found.code == 2
    assert what in found.err
    assert "Traceback" not in found.err
    assert found.out == ""
    assert sorted(tmp_path.rglob("*")) == before


def test_broken_yaml_and_missing_files_exit_with_2(ah: Ah, tmp_path: Path) -> None:
    config = tmp_path / "config.yml"
    config.write_text("base_model: [1")
    found = ah("train", config)
    assert (found.code, "config.yml:1:15" in found.err) == (2, True)
    assert ah("train", tmp_path / "none.yml").code == 2
    assert ah("train").code == 2
    assert ah("train", "--resume", tmp_path / "none").code == 2
    assert ah("train", "--resume", tmp_path, "--seed", 1).code == 2


def test_a_base_without_a_template_takes_no_chat(ah: Ah, write_config: Writer, tmp_path: Path, tiny_base: Path) -> None:
    bare = tmp_path / "bare"
    bare.mkdir()
    for file in tiny_base.iterdir():
        if file.name != "chat_template.jinja":
            (bare / file.name).symlink_to(file)
    found = ah("train", write_config(base_model=str(bare)))
    assert (found.code, "chat data needs a chat template" in found.err) == (2, True)
    assert ah("train", write_config(base_model=str(bare), chat_template="chatml"), "--show-labels", 1).code == 0


@pytest.mark.slow
def test_advice_comes_with_its_reason(ah: Ah, write_config: Writer) -> None:
    keys = {"lora_target_modules": ["q_proj"], "adapterhub": {"task": "domain"}, "learning_rate": 0.9}
    config = write_config(**keys, train_on_inputs=True, max_steps=1, sequence_len=4096)
    found = ah("train", config)
    assert found.code == 0
    for words in (
        "the MLP layers are left out",
        "learning_rate 0.9 is far",
        "train_on_inputs",
        "beyond the base's 512",
    ):
        assert words in found.err


def test_what_the_rows_are_and_which_columns_are_not_used_is_said(ah: Ah, write_config: Writer) -> None:
    rows = [{"question": "Say hi.", "answer": "Ahoy!", "source": "forum"}] * 3
    done = ah("train", write_config(rows=rows), "--show-labels", 1)
    assert done.code == 0, done.err
    assert "3 rows of question/answer, told from the rows" in done.err
    assert "not used: the columns source of train.jsonl" in done.err


def test_bad_rows_are_left_out_where_asked_for_and_named(ah: Ah, write_config: Writer) -> None:
    rows = [*[{"question": "Say hi.", "answer": "Ahoy!"}] * 3, {"question": "Say hi."}]
    config = write_config(rows=rows)
    refused = ah("train", config, "--show-labels", 1)
    assert refused.code == 2
    assert "train.jsonl:4: answer is missing" in refused.err
    done = ah("train", config, "--show-labels", 1, "--skip-bad-rows", 1)
    assert done.code == 0, done.err
    assert "train.jsonl:4: answer is missing" in done.err
    assert "duplicates: 2 rows" in done.err
