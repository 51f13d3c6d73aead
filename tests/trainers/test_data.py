"""Data is read whole and strictly: every bad row is named."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import pytest

from adapterhub.errors import DataError
from adapterhub.trainers.config import DataSource, UserFormat
from adapterhub.trainers.data import Conversation, DataFile, Segments, Text, Tokens, read_source

USER, ANSWER = {"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Ahoy"}
CHAT = {"messages": [USER, ANSWER]}


def read(path: Path, **options: Any) -> DataFile:
    return read_source(DataSource(path=str(path), **options))


def lines(tmp_path: Path, *rows: Any, name: str = "train.jsonl") -> Path:
    path = tmp_path / name
    path.write_bytes(b"".join(r if isinstance(r, bytes) else json.dumps(r).encode() + b"\n" for r in rows))
    return path


def test_chat_rows_are_told_from_the_rows(tmp_path: Path) -> None:
    path = lines(tmp_path, CHAT, CHAT)
    file = read(path)
    assert (file.format, file.detected, len(file.rows)) == ("messages", True, 2)
    assert file.sha256 == hashlib.sha256(path.read_bytes()).hexdigest()
    row = file.rows[1]
    assert isinstance(row, Conversation)
    assert row.where == f"{path}:2"
    assert row.messages == (USER, ANSWER)


def test_prompt_and_completion_are_plain_text_or_messages(tmp_path: Path) -> None:
    file = read(
        lines(tmp_path, {"prompt": "2+2=", "completion": "4"}, {"prompt": [USER, ANSWER, USER], "completion": [ANSWER]})
    )
    text, chat = file.rows
    assert isinstance(text, Text)
    assert (text.prompt, text.completion) == ("2+2=", "4")
    assert isinstance(chat, Conversation)
    assert (len(chat.messages), chat.trained_places) == (4, (3,))


def test_sharegpt_roles_are_mapped(tmp_path: Path) -> None:
    turns = [{"from": "system", "value": "S"}, {"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Ahoy"}]
    file = read(lines(tmp_path, {"conversations": turns}))
    assert file.format == "sharegpt"
    row = file.rows[0]
    assert isinstance(row, Conversation)
    assert [m["role"] for m in row.messages] == ["system", "user", "assistant"]
    assert row.messages[2]["content"] == "Ahoy"


def test_fields_and_roles_can_be_renamed(tmp_path: Path) -> None:
    path = lines(tmp_path, {"turns": [{"who": "client", "what": "Hi"}, {"who": "agent", "what": "Ahoy"}]})
    file = read(
        path,
        type="chat_template",
        field_messages="turns",
        message_property_mappings={"role": "who", "content": "what"},
        roles={"client": "user", "agent": "assistant"},
    )
    row = file.rows[0]
    assert isinstance(row, Conversation)
    assert row.messages == (USER, ANSWER)


def test_a_question_with_its_answer_is_one_exchange(tmp_path: Path) -> None:
    exchange = ({"role": "system", "content": "S"}, USER, ANSWER)
    for i, (shown, row) in enumerate(
        {
            "question/answer": {"question": "Hi", "answer": "Ahoy", "system": "S"},
            "instruction/output": {"instruction": "Hi", "input": "", "output": "Ahoy", "system": "S"},
        }.items()
    ):
        file = read(lines(tmp_path, {**row, "id": 7}, name=f"{i}.jsonl"))
        assert (file.format, file.detected, file.unused) == (shown, True, ("id",))
        assert isinstance(file.rows[0], Conversation)
        assert file.rows[0].messages == exchange
    (row,) = read(lines(tmp_path, {"instruction": "Sort.", "input": "b, a", "output": "a, b"})).rows
    assert isinstance(row, Conversation)
    assert row.messages[0]["content"] == "Sort.\n\nb, a"


def test_alpaca_by_name_is_the_published_text(tmp_path: Path) -> None:
    path = lines(
        tmp_path,
        {"instruction": "Sort {input}.", "input": "b, a", "output": "a, b"},
        {"instruction": "Hi", "output": "x"},
    )
    with_input, without = read(path, type="alpaca").rows
    assert isinstance(with_input, Text)
    assert isinstance(without, Text)
    assert with_input.prompt == (
        "Below is an instruction that describes a task, paired with an input that provides further context. "
        "Write a response that appropriately completes the request.\n\n"
        "### Instruction:\nSort {input}.\n\n### Input:\nb, a\n\n### Response:\n"
    )
    assert without.prompt.endswith("completes the request.\n\n### Instruction:\nHi\n\n### Response:\n")
    assert "### Input" not in without.prompt
    (chat, *_) = read(path, type="alpaca:chat").rows
    assert isinstance(chat, Text)
    assert chat.prompt == "USER: Sort {input}.\nb, a\nASSISTANT: "


def test_a_format_of_your_own(tmp_path: Path) -> None:
    path = lines(tmp_path, {"q": "2+2", "a": "4", "hint": "add"}, {"q": "1+1", "a": "2"})
    user = UserFormat(
        field_instruction="q", field_output="a", field_input="hint", format="Q: {instruction} ({input})\nA: ",
        no_input_format="Q: {instruction}\nA: ", system_prompt="Count.", system_format="{system}\n",
    )  # fmt: skip
    file = read(path, type=user)
    assert (file.format, file.detected) == ("your format", False)
    assert [row.prompt for row in file.rows if isinstance(row, Text)] == [
        "Count.\nQ: 2+2 (add)\nA: ",
        "Count.\nQ: 1+1\nA: ",
    ]
    (row, _) = read(path, type=UserFormat(field_instruction="q", field_output="a", field_input="hint")).rows
    assert isinstance(row, Conversation)
    assert [m["content"] for m in row.messages] == ["2+2\n\nadd", "4"]


def test_text_segments_and_token_ids(tmp_path: Path) -> None:
    (text,) = read(lines(tmp_path, {"body": "Once."}), field="body").rows
    assert text == Text("", "Once.", f"{tmp_path}/train.jsonl:1", splits=True)
    pieces = [{"label": False, "text": "Q"}, {"label": True, "text": "A"}]
    (segments,) = read(lines(tmp_path, {"segments": pieces})).rows
    assert isinstance(segments, Segments)
    assert segments.pieces == (("Q", False), ("A", True))
    ids = {"input_ids": [1, 2, 3, 0], "labels": [-100, 2, 3, -100], "attention_mask": [1, 1, 1, 0]}
    (tokens, plain) = read(lines(tmp_path, ids, {"input_ids": [4, 5]})).rows
    assert isinstance(tokens, Tokens)
    assert isinstance(plain, Tokens)
    assert (tokens.input_ids, tokens.labels) == ((1, 2, 3), (-100, 2, 3))
    assert plain.labels == (4, 5)


def test_messages_win_over_a_prompt_beside_them_and_it_is_said(tmp_path: Path) -> None:
    file = read(lines(tmp_path, {"prompt": "Hi", "prompt_id": "x", **CHAT}))
    assert (file.format, file.unused) == ("messages", ("prompt", "prompt_id"))


def test_a_system_column_becomes_the_system_message(tmp_path: Path) -> None:
    said = {"role": "system", "content": "S"}
    for extra, expected in (({}, (said, USER, ANSWER)), ({"drop_system_message": True}, (USER, ANSWER))):
        (row,) = read(lines(tmp_path, {**CHAT, "system": "S"}), **extra).rows
        assert isinstance(row, Conversation)
        assert row.messages == expected
        assert row.trained_places == (len(expected) - 1,)


def test_which_turns_are_trained_on_can_be_said(tmp_path: Path) -> None:
    path = lines(
        tmp_path, {"messages": [USER, {**ANSWER, "weight": 0, "train": False}, USER, ANSWER, {**USER, "train": True}]}
    )

    def places(**options: Any) -> tuple[int, ...]:
        (row,) = read(path, **options).rows
        assert isinstance(row, Conversation)
        assert not any("weight" in m for m in row.messages if "message_field_training" not in options)
        return row.trained_places

    assert places() == (3,)  # weight, as OpenAI has it
    assert places(message_field_training="train") == (3, 4)
    assert places(message_field_training="train", roles_to_train=()) == (4,)
    assert places(roles_to_train=("user", "assistant")) == (0, 2, 3, 4)


def test_sharegpt_function_calls_are_calls(tmp_path: Path) -> None:
    turns = [
        {"from": "human", "value": "Rome?"},
        {"from": "function_call", "value": '{"name": "find", "arguments": {"city": "Rome"}}'},
        {"from": "observation", "value": "sunny"},
        {"from": "gpt", "value": "Sunny."},
    ]
    tools = json.dumps([{"type": "function", "function": {"name": "find", "parameters": {"type": "object"}}}])
    (row,) = read(lines(tmp_path, {"conversations": turns, "tools": tools})).rows
    assert isinstance(row, Conversation)
    assert [m["role"] for m in row.messages] == ["user", "assistant", "tool", "assistant"]
    assert row.messages[1]["tool_calls"][0]["function"] == {"name": "find", "arguments": {"city": "Rome"}}


def test_tool_calls_reach_the_template_as_objects(tmp_path: Path) -> None:
    call = {"id": "c1", "type": "function", "function": {"name": "find", "arguments": '{"city": "Rome"}'}}
    tool = {"type": "function", "function": {"name": "find", "parameters": {"type": "object"}}}
    row = {"messages": [USER, {"role": "assistant", "content": None, "tool_calls": [call]}], "tools": [tool]}
    found = read(lines(tmp_path, row, row | {"tools": json.dumps([tool])})).rows
    for conversation in found:
        assert isinstance(conversation, Conversation)
        assert conversation.messages[1]["content"] == ""
        assert conversation.messages[1]["tool_calls"][0]["function"]["arguments"] == {"city": "Rome"}
        assert conversation.tools == (tool,)


def test_byte_order_mark_crlf_and_blank_lines_are_no_rows(tmp_path: Path) -> None:
    row = json.dumps(CHAT).encode()
    file = read(lines(tmp_path, b"\xef\xbb\xbf" + row + b"\r\n", b"\r\n", b"\n", row))
    assert [row.where.rsplit(":", 1)[1] for row in file.rows] == ["1", "4"]


def test_text_that_looks_like_keys_is_text(tmp_path: Path) -> None:
    text = 'say {"a": 1, "a": 2} and "b" : 3'
    (row,) = read(lines(tmp_path, {"prompt": text, "completion": text})).rows
    assert isinstance(row, Text)
    assert (row.prompt, row.completion) == (text, text)


def test_a_path_is_looked_up_beside_the_config_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    here, there = tmp_path / "here", tmp_path / "there"
    here.mkdir()
    there.mkdir()
    monkeypatch.chdir(here)
    lines(here, CHAT)
    assert read_source(DataSource(path="train.jsonl"), beside=there).path == Path("train.jsonl")
    lines(there, CHAT)
    assert read_source(DataSource(path="train.jsonl"), beside=there).path == there / "train.jsonl"


@pytest.mark.parametrize(
    ("row", "what"),
    [
        (b"{nope}\n", "not JSON, column 2"),
        (b"\n\n[1]\n", ":3: the row is a list"),
        (b'{"messages": "\xff"}\n', "byte 14 is not UTF-8"),
        (b"[" * 100_000 + b"\n", "not JSON, nested too deep"),
        (b'{"prompt": "a", "completion": "b", "prompt" : "c"}\n', 'the key "prompt" is there twice'),
        (b'{"messages": [{"role": "user", "role": "assistant", "content": "x"}]}\n', 'the key "role" is there twice'),
        (b'{"prompt": "a\x00b", "completion": "c"}\n', "a NUL byte at column 14"),
        (b'{"prompt": "a\\u0000b", "completion": "c"}\n', "a NUL character"),
        (b'{"prompt": "a", "completion": NaN}\n', "NaN is no JSON"),
        (b'{"prompt": "\\ud83d", "completion": "c"}\n', "half a surrogate pair"),
        (b'{"prompt": "a", "completion": "b"}{}\n', "not JSON, column 35"),
        ({}, "no known format, the row has nothing"),
        ({"instruction": "a", "response": "b"}, "no known format, the row has instruction, response"),
        ({"system": "s", "question": "a", "chosen": "b", "rejected": "c"}, "preference pairs"),
        ({"prompt": "a", "chosen": [ANSWER], "rejected": [ANSWER]}, "preference pairs"),
        ({**CHAT, "prompt": "a", "completion": "b"}, "both messages and prompt/completion"),
        ({**CHAT, "conversations": []}, "conversations is empty"),
        ({"question": "a", "answer": "b", "instruction": "c", "output": "d"}, "both question/answer and instruction"),
        ({"question": "a", "answer": " "}, "answer is empty"),
        ({"instruction": "a", "output": ["b"]}, "output is a list"),
        ({"instruction": "a", "input": 3, "output": "b"}, "input is a number"),
        ({"text": ""}, "text is empty"),
        ({"segments": []}, "segments is empty"),
        ({"segments": [{"text": "a"}]}, "segments[0].label is missing"),
        ({"segments": [{"label": False, "text": "a"}]}, "segments has no text with label true"),
        ({"segments": [{"label": True, "text": None}]}, "segments[0].text is missing"),
        ({"input_ids": []}, "input_ids is empty"),
        ({"input_ids": [1, 2.5]}, "input_ids holds 2.5"),
        ({"input_ids": [1, -2]}, "input_ids holds -2"),
        ({"input_ids": [1, 2], "labels": [1]}, "labels has 1 values, input_ids 2"),
        ({"input_ids": [1, 2], "labels": [1, 3]}, "labels holds 3"),
        ({"input_ids": [1, 2], "labels": [1, -100]}, "no token of labels is trained on"),
        ({**CHAT, "system": 7}, "system is a number"),
        ({"messages": [{"role": "system", "content": "a"}, USER, ANSWER], "system": "b"}, "both system and a system"),
        ({"messages": [USER, {**ANSWER, "weight": 0.5}]}, "messages[1].weight is 0.5"),
        ({"messages": [USER, {**ANSWER, "weight": 0}]}, "no assistant message"),
        (
            {"messages": [{"role": "user", "content": [{"type": "image_url"}]}, ANSWER]},
            "messages[0].content[0] is image_url",
        ),
        ({"messages": []}, "messages is empty"),
        ({"messages": "Hi"}, "messages is text"),
        ({"messages": ["Hi"]}, "messages[0] is text"),
        ({"messages": [USER]}, "no assistant message"),
        ({"messages": [{"content": "Hi"}, ANSWER]}, "messages[0].role is missing"),
        ({"messages": [{"role": "client", "content": "Hi"}, ANSWER]}, 'messages[0].role is "client"'),
        ({"messages": [{"role": "user"}, ANSWER]}, "messages[0].content is missing"),
        ({"messages": [{"role": "user", "content": 3}, ANSWER]}, "messages[0].content is a number"),
        ({"messages": [USER, {"role": "assistant", "content": " "}]}, "messages[1] is an empty assistant message"),
        ({"messages": [{**USER, "tool_calls": [{}]}, ANSWER]}, "messages[0] has tool_calls, and its role is user"),
        ({"messages": [USER, {"role": "assistant", "tool_calls": [{}]}]}, "tool_calls[0] names no function"),
        (
            {"messages": [USER, {"role": "assistant", "tool_calls": [{"name": "f", "arguments": "{"}]}]},
            "arguments is not JSON",
        ),
        ({**CHAT, "tools": [{"name": "f"}]}, "tools[0] names no function"),
        ({**CHAT, "tools": "["}, "tools is not JSON"),
        (
            {**CHAT, "tools": [{"type": "function", "function": {"name": "f", "parameters": "x"}}]},
            "tools[0].function.parameters is no JSON schema",
        ),
        (
            {**CHAT, "tools": [{"type": "function", "function": {"name": "f", "parameters": {"type": "strin"}}}]},
            'tools[0].function.parameters is no JSON schema: type is "strin"',
        ),
        (
            {
                "messages": [USER, {"role": "assistant", "tool_calls": [{"name": "g", "arguments": {}}]}],
                "tools": [{"type": "function", "function": {"name": "f"}}],
            },
            'messages[1] calls "g", which is none of the row\'s tools',
        ),
        ({"prompt": "a", "completion": ""}, "completion is empty"),
        ({"prompt": "a", "completion": None}, "completion is missing"),
        ({"prompt": "a", "completion": [ANSWER]}, "completion is a list"),
        ({"prompt": [USER], "completion": [USER]}, "no assistant message"),
        ({"conversations": [{"from": "alien", "value": "x"}]}, 'conversations[0].from is "alien"'),
    ],
)
def test_a_bad_row_is_named_with_what_was_expected(tmp_path: Path, row: Any, what: str) -> None:
    path = lines(tmp_path, row)
    with pytest.raises(DataError) as caught:
        read(path)
    assert caught.value.what.startswith(f"{path}:")
    assert what in caught.value.what
    assert "expected" in caught.value.why


def test_all_bad_rows_are_counted_and_the_first_are_named(tmp_path: Path) -> None:
    rows = [CHAT if i % 2 else {"messages": []} for i in range(20)]
    with pytest.raises(DataError) as caught:
        read(lines(tmp_path, *rows))
    assert caught.value.what.endswith("train.jsonl:1: messages is empty")
    assert "10 of 20 rows are bad, also lines 3, 5, 7, 9 and 5 more" in caught.value.why


def test_a_row_of_another_format_than_the_first_is_bad(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=":2: no messages"):
        read(lines(tmp_path, CHAT, {"prompt": "a", "completion": "b"}))


def test_missing_empty_and_folders_are_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="was not found"):
        read(tmp_path / "none.jsonl")
    with pytest.raises(DataError, match=r"the folder .* is empty"):
        read(tmp_path)
    for content in (b"", b"\n\n"):
        with pytest.raises(DataError, match="is empty"):
            read(lines(tmp_path, content))
