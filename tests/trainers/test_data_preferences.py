"""Preference rows in every shape that people have them in, and what is refused of them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest

from adapterhub.errors import DataError
from adapterhub.trainers.config import DataSource, Method, UserPreference
from adapterhub.trainers.data import Conversation, DataFile, Judged, Pair, Text, read_source

Writer = Callable[..., Path]
Read = Callable[..., DataFile]
USER, CHOSEN, REJECTED = ({"role": role, "content": text} for role, text in
                          (("user", "Hi"), ("assistant", "Ahoy!"), ("assistant", "What?")))  # fmt: skip
ANSWERS = {"chosen": "Ahoy!", "rejected": "What?"}


@pytest.fixture
def read(write_rows: Writer) -> Read:
    """Reads rows as preference data: ``read(row, …, method="dpo", type="llama3.ultra")``."""

    def reading(*rows: Mapping[str, Any], method: Method = "dpo", **options: Any) -> DataFile:
        return read_source(DataSource(path=str(write_rows(rows)), **options), method=method)

    return reading


def texts(row: Any) -> list[str]:
    return [f"{message['role']}: {message['content']}" for message in row.messages]


@pytest.mark.parametrize(
    ("row", "kind"),
    [
        ({"messages": [USER], **ANSWERS}, "chat_template.default"),
        ({"messages": [USER], "chosen": CHOSEN, "rejected": REJECTED}, "chat_template"),
        ({"conversation": [USER], "chosen": CHOSEN, "rejected": [REJECTED]}, None),
        ({"prompt": [USER], "chosen": [CHOSEN], "rejected": [REJECTED]}, None),
        ({"prompt": "Hi", "chosen": [CHOSEN], "rejected": [REJECTED]}, None),
        ({"prompt": "Hi", **ANSWERS}, "llama3.prompt_pairs"),
        ({"prompt": "Hi", "chosen": [USER, CHOSEN], "rejected": [USER, REJECTED]}, "llama3.ultra"),
        ({"chosen": [USER, CHOSEN], "rejected": [USER, REJECTED]}, "chatml.argilla_chat"),
        ({"question": "Hi", **ANSWERS}, "chatml.intel"),
        ({"input": "Hi", **ANSWERS}, "chatml.icr"),
        ({"instruction": "Hi", "chosen_response": "Ahoy!", "rejected_response": "What?"}, "chatml.argilla"),
        ({"instruction": "Hi", "input": "", **ANSWERS}, None),
        ({"prompt": [{"from": "human", "value": "Hi"}], "chosen": {"from": "gpt", "value": "Ahoy!"},
          "rejected": {"from": "gpt", "value": "What?"}}, None),
        ({"conversations": [{"from": "human", "value": "Hi"}], "chosen": {"from": "gpt", "value": "Ahoy!"},
          "rejected": {"from": "gpt", "value": "What?"}}, None),
    ],
)  # fmt: skip
def test_a_pair_is_a_prompt_and_two_answers_however_it_is_written(
    row: dict[str, Any], kind: str | None, read: Read
) -> None:
    found = read(row, type=kind)
    pair = found.rows[0]
    assert isinstance(pair, Pair)
    assert texts(pair.chosen) == ["user: Hi", "assistant: Ahoy!"]
    assert texts(pair.rejected) == ["user: Hi", "assistant: What?"]
    assert isinstance(pair.chosen, Conversation)
    assert pair.chosen.trained == (1,)
    assert (found.format, found.unused, found.chat) == ("pairs of answers", (), True)


def test_a_system_column_becomes_a_message(read: Read) -> None:
    for row in ({"system": "Be brief.", "question": "Hi", **ANSWERS},
                {"system": "Be brief.", "chosen": [USER, CHOSEN], "rejected": [USER, REJECTED]}):  # fmt: skip
        pair = read(row).rows[0]
        assert isinstance(pair, Pair)
        assert texts(pair.chosen) == ["system: Be brief.", "user: Hi", "assistant: Ahoy!"]
        assert isinstance(pair.chosen, Conversation)
        assert pair.chosen.trained == (2,)


def test_whole_conversations_part_at_the_answer_and_earlier_turns_are_not_trained_on(read: Read) -> None:
    before = [USER, {"role": "assistant", "content": "Yes?"}, {"role": "user", "content": "Go on."}]
    pair = read({"chosen": [*before, CHOSEN], "rejected": [*before, REJECTED], "prompt": "Hi"}).rows[0]
    assert isinstance(pair, Pair)
    assert isinstance(pair.chosen, Conversation)
    assert pair.chosen.trained == (3,)


def test_plain_text_stays_text(read: Read) -> None:
    found = read({"prompt": "Hi", **ANSWERS})
    pair = found.rows[0]
    assert isinstance(pair, Pair)
    assert (pair.chosen, found.format, found.chat) == (
        Text("Hi", "Ahoy!", pair.where),
        "pairs of answers, plain text",
        False,
    )


def test_columns_and_formats_of_ones_own(read: Read) -> None:
    row = {"q": "Hi {system}", "s": "Be brief.", "good": "Ahoy!", "bad": "What?", "id": 7}
    named = {"field_prompt": "q", "field_system": "s", "field_chosen": "good", "field_rejected": "bad"}
    found = read(row, type=UserPreference(**named))
    assert texts(found.rows[0].chosen)[0] == "system: Be brief."  # type: ignore[union-attr]
    assert found.unused == ("id",)
    spelt = UserPreference(**named, prompt_format="[{system}] {prompt}\n", chosen_format="> {chosen}")
    pair = read(row, type=spelt).rows[0]
    assert isinstance(pair, Pair)
    assert (pair.chosen, pair.rejected) == (
        Text("[Be brief.] Hi {system}\n", "> Ahoy!", pair.where), Text("[Be brief.] Hi {system}\n", "What?", pair.where)
    )  # fmt: skip
    assert texts(read(row, **named).rows[0].chosen)[1] == "user: Hi {system}"  # type: ignore[union-attr]


@pytest.mark.parametrize("label", [True, 1, "true", "True"])
@pytest.mark.parametrize("completion", ["Ahoy!", CHOSEN, [CHOSEN]])
def test_a_judged_answer(label: Any, completion: Any, read: Read) -> None:
    found = read({"prompt": [USER], "completion": completion, "label": label}, method="kto")
    row = found.rows[0]
    assert isinstance(row, Judged)
    assert (texts(row.answer), row.good, found.format) == (
        ["user: Hi", "assistant: Ahoy!"],
        True,
        "answers with a label",
    )


def test_a_judged_answer_may_be_a_whole_conversation_or_text(read: Read) -> None:
    row = read({"completion": [USER, REJECTED], "label": False}, method="kto", type="llama3.argilla_chat").rows[0]
    assert isinstance(row, Judged)
    assert (texts(row.answer), row.good) == (["user: Hi", "assistant: What?"], False)
    plain = read({"prompt": "Hi", "completion": "What?", "label": 0}, method="kto").rows[0]
    assert isinstance(plain, Judged)
    assert isinstance(plain.answer, Text)


def test_pairs_are_read_for_kto_too(read: Read) -> None:
    assert isinstance(read({"prompt": [USER], **ANSWERS}, method="kto").rows[0], Pair)


@pytest.mark.parametrize(
    ("row", "options", "what"),
    [
        ({"messages": [USER, CHOSEN]}, {}, "no preferences, the row has messages"),
        ({"prompt": "Hi", "chosen": "Ahoy!"}, {}, "no preferences, the row has prompt, chosen"),
        (ANSWERS, {}, "no prompt"),
        ({"prompt": "Hi", "chosen": "Ahoy!", "rejected": "Ahoy!"}, {}, "chosen and rejected are the same"),
        ({"prompt": "Hi", "chosen": "Ahoy!", "rejected": " "}, {}, "rejected is empty"),
        ({"prompt": "Hi", "chosen": "Ahoy!", "rejected": None}, {"type": "llama3.prompt_pairs"}, "rejected is missing"),
        ({"prompt": "Hi", "chosen": 3, "rejected": "What?"}, {"type": "llama3.prompt_pairs"}, "chosen is a number"),
        ({"prompt": [USER, CHOSEN], **ANSWERS}, {}, "prompt ends with an assistant message"),
        ({"prompt": [USER], "chosen": [CHOSEN, USER], "rejected": "What?"}, {}, "chosen holds more than the answer"),
        ({"chosen": [USER, CHOSEN], "rejected": [{**USER, "content": "Ho"}, REJECTED]}, {},
         r"chosen and rejected part at chosen\[0\], a user message"),
        ({"chosen": [USER, CHOSEN], "rejected": [USER]}, {}, "rejected has no answer of its own"),
        ({"chosen": [USER, CHOSEN], "rejected": [USER, CHOSEN]}, {}, "chosen has no answer of its own"),
        ({"prompt": "Hi", "completion": "Ahoy!", "label": True}, {}, "answers with a label, and rl is dpo"),
        ({"prompt": "Hi", "completion": "Ahoy!", "label": "good"}, {"method": "kto"}, 'label is "good"'),
        ({"prompt": "Hi", "completion": "Ahoy!", "label": None}, {"method": "kto"}, "label is missing"),
        ({"prompt": "Hi", "completion": "Ahoy!", "label": 0.5}, {"method": "kto"}, "label is 0.5"),
    ],
)  # fmt: skip
def test_a_row_that_compares_nothing_is_named(
    row: dict[str, Any], options: dict[str, Any], what: str, read: Read
) -> None:
    with pytest.raises(DataError, match=what) as caught:
        read(row, **options)
    assert "train.jsonl:1" in caught.value.what


def test_every_row_must_be_what_the_first_one_is(read: Read) -> None:
    with pytest.raises(DataError, match=r"train\.jsonl:2: prompt is a list"):
        read({"prompt": "Hi", **ANSWERS}, {"prompt": [USER], **ANSWERS})
    with pytest.raises(DataError, match=r"train\.jsonl:2: prompt is missing"):
        read({"prompt": [USER], **ANSWERS}, {"question": "Hi", **ANSWERS})
