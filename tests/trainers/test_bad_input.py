"""What a tired person hands over: rows too long, columns too many, files from elsewhere."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

Writer = Callable[..., Path]
Ah = Callable[..., Any]


def chat(user: str, assistant: str) -> dict[str, Any]:
    return {"messages": [{"role": "user", "content": user}, {"role": "assistant", "content": assistant}]}


LONG = [chat("Say it.", "Ahoy! " * 40), *[chat(f"Say {i}.", f"Ahoy, {i}!") for i in range(3)]]


def test_rows_that_are_too_long_are_dropped_and_named(ah: Ah, write_config: Writer) -> None:
    done = ah("train", write_config(rows=LONG, sequence_len=80), "--show-labels", 9)
    assert done.code == 0, done.err
    assert "rows: 3 with" in done.err
    assert "dropped: 1 rows longer than sequence_len 80, first" in done.err
    assert "train.jsonl:1" in done.err
    assert done.out.count("<|im_end|>⟧") == 3  # no row without its end


def test_rows_that_are_cut_lose_their_ends_and_it_is_said(ah: Ah, write_config: Writer) -> None:
    config = write_config(rows=LONG, sequence_len=80, excess_length_strategy="truncate")
    done = ah("train", config, "--show-labels", 9)
    assert done.code == 0, done.err
    assert "cut: 1 rows at sequence_len 80; they lose their ends" in done.err
    assert done.out.count("<|im_end|>⟧") == 3


def test_a_row_that_is_cut_to_its_prompt_is_left_out(ah: Ah, write_config: Writer) -> None:
    rows = [chat("Say it. " * 40, "Ahoy!"), *LONG[1:]]
    config = write_config(rows=rows, sequence_len=80, excess_length_strategy="truncate")
    done = ah("train", config, "--show-labels", 9)
    assert done.code == 0, done.err
    assert "dropped: 1 rows" in done.err
    alone = ah("train", write_config(rows=rows[:1], sequence_len=80, excess_length_strategy="truncate"))
    assert (alone.code, "cut to their prompts" in alone.err) == (2, True)


def test_columns_that_are_not_used_are_named_and_a_prompt_beside_messages_too(ah: Ah, write_config: Writer) -> None:
    rows = [{"prompt": "Hi", "prompt_id": "7", **chat("Hi", "Ahoy!")}] * 2
    done = ah("train", write_config(rows=rows), "--show-labels", 1)
    assert "not used: the columns prompt, prompt_id of train.jsonl" in done.err


@pytest.mark.parametrize(
    ("content", "what"),
    [
        ("base_model: x\n".encode("utf-16"), "is not UTF-8"),
        (b"base_model: caf\xe9\n", "is not UTF-8"),
        (b"base_model: x\n\tlora_r: 8\n", "config.yml:2:1: this is not YAML"),
        (b"{}", "base_model is missing"),
        (b"lora_r = 8\nbase_model = x\n", "the file is no mapping"),
    ],
)
def test_a_config_that_is_no_yaml_is_refused(ah: Ah, tmp_path: Path, content: bytes, what: str) -> None:
    config = tmp_path / "config.yml"
    config.write_bytes(content)
    found = ah("train", config)
    assert (found.code, what in found.err) == (2, True), found.err


def test_a_config_from_windows_is_read(ah: Ah, write_config: Writer) -> None:
    config = write_config()
    config.write_bytes(b"\xef\xbb\xbf" + config.read_bytes().replace(b"\n", b"\r\n"))
    assert ah("train", config, "--check").code == 0
