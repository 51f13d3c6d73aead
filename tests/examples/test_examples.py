"""The example data sets are what their pages say: regular, without duplicates, held out where they should be."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import yaml
from jsonschema import Draft202012Validator

from adapterhub.trainers import read_config, read_yaml

EXAMPLES = Path(__file__).resolve().parents[2] / "examples"
SUPPORT, CALLING = EXAMPLES / "support-bot", EXAMPLES / "function-calling"
HOUSE_TONE = {
    "": r"Ahoy! Harbor Coffee Roasters here\. .+ Fair winds, the Harbor crew\.\nTicket: [a-z]+",
    "-v2": r"Good day from Harbor Coffee Roasters! .+ Enjoy every cup, your Harbor team\.\nTicket: [a-z]+",
}


def rows(file: Path) -> list[list[dict[str, str]]]:
    return [json.loads(line)["messages"] for line in file.read_text().splitlines()]


def answers(conversation: list[dict[str, str]]) -> list[str]:
    return [m["content"] for m in conversation if m["role"] == "assistant"]


def test_every_data_set_is_found() -> None:
    assert {f.relative_to(EXAMPLES).as_posix() for f in EXAMPLES.glob("*/*.jsonl")} == {
        "support-bot/train.jsonl",
        "support-bot/train-v2.jsonl",
        "support-bot/eval.jsonl",
        "support-bot/eval-v2.jsonl",
        "support-bot/pairs.jsonl",
        "support-bot/pairs-eval.jsonl",
        "function-calling/train.jsonl",
        "function-calling/eval.jsonl",
    }


@pytest.mark.parametrize("file", sorted(EXAMPLES.glob("*/train*.jsonl")), ids=lambda f: f"{f.parent.name}/{f.stem}")
def test_training_rows_are_enough_and_nothing_is_there_twice(file: Path) -> None:
    conversations = rows(file)
    assert 60 <= len(conversations) <= 200
    firsts = [next(m["content"] for m in c if m["role"] == "user") for c in conversations]
    assert len(set(firsts)) == len(firsts)


@pytest.mark.parametrize("file", sorted(EXAMPLES.glob("*/[et]*.jsonl")), ids=lambda f: f"{f.parent.name}/{f.stem}")
def test_roles_take_turns_and_the_assistant_has_the_last_word(file: Path) -> None:
    for conversation in rows(file):
        roles = "".join(m["role"][0] for m in conversation)
        assert re.fullmatch("s?(ua)+", roles), conversation


@pytest.mark.parametrize(("train", "held_out"), [
    (SUPPORT / "train.jsonl", SUPPORT / "eval.jsonl"),
    (SUPPORT / "train-v2.jsonl", SUPPORT / "eval-v2.jsonl"),
    (CALLING / "train.jsonl", CALLING / "eval.jsonl"),
])  # fmt: skip
def test_held_out_questions_are_held_out(train: Path, held_out: Path) -> None:
    seen = {m["content"] for c in rows(train) for m in c if m["role"] == "user"}
    asked = {m["content"] for c in rows(held_out) for m in c if m["role"] == "user"}
    assert 8 <= len(asked) <= 12
    assert not asked & seen


@pytest.mark.parametrize("tone", HOUSE_TONE)
def test_every_support_answer_keeps_the_house_tone(tone: str) -> None:
    for conversation in [*rows(SUPPORT / f"train{tone}.jsonl"), *rows(SUPPORT / f"eval{tone}.jsonl")]:
        for answer in answers(conversation):
            assert re.fullmatch(HOUSE_TONE[tone], answer), answer


def test_the_two_versions_differ_in_tone_only() -> None:
    first, second = rows(SUPPORT / "train.jsonl"), rows(SUPPORT / "train-v2.jsonl")
    questions = [[m["content"] for m in c if m["role"] == "user"] for c in first]
    assert questions == [[m["content"] for m in c if m["role"] == "user"] for c in second]
    assert all(set(answers(a)).isdisjoint(answers(b)) for a, b in zip(first, second, strict=True))


@pytest.mark.parametrize(("pairs", "split"), [("pairs", "train"), ("pairs-eval", "eval")])
def test_a_pair_prefers_the_new_tone_to_the_old_one(pairs: str, split: str) -> None:
    first, second = (rows(SUPPORT / f"{split}{version}.jsonl") for version in ("", "-v2"))
    for line, old, new in zip((SUPPORT / f"{pairs}.jsonl").read_text().splitlines(), first, second, strict=True):
        pair = json.loads(line)
        assert pair == {"messages": [new[0]], "chosen": new[1]["content"], "rejected": old[1]["content"]}


def tools() -> dict[str, dict[str, Any]]:
    listed = json.loads((CALLING / "tools.json").read_text())
    return {t["function"]["name"]: t["function"]["parameters"] for t in listed}


def test_the_tool_schemas_are_schemas() -> None:
    for schema in tools().values():
        Draft202012Validator.check_schema(schema)
        assert schema["additionalProperties"] is False


def test_every_tool_call_fits_its_schema() -> None:
    schemas, called, plain = tools(), set(), 0
    for conversation in [*rows(CALLING / "train.jsonl"), *rows(CALLING / "eval.jsonl")]:
        for answer in answers(conversation):
            call = re.fullmatch(r"<tool_call>(.+)</tool_call>", answer)
            if call is None:
                assert "tool_call" not in answer and "{" not in answer
                plain += 1
                continue
            parsed = json.loads(call[1])
            assert json.dumps(parsed, separators=(",", ":")) == call[1], "calls are compact"
            Draft202012Validator(schemas[parsed["name"]]).validate(parsed["arguments"])
            called.add(parsed["name"])
    assert called == set(schemas)
    assert plain >= 15


def test_the_system_message_names_every_tool_with_its_arguments() -> None:
    (system,) = {c[0]["content"] for f in ("train", "eval") for c in rows(CALLING / f"{f}.jsonl")}
    for name, schema in tools().items():
        assert f"{name}({', '.join(schema['properties'])})" in system


def test_the_second_config_differs_in_data_only() -> None:
    first, second = (yaml.safe_load((SUPPORT / f"config{v}.yml").read_text()) for v in ("", "-v2"))
    assert second["datasets"][0]["path"] == "train-v2.jsonl"
    assert second["test_datasets"][0]["path"] == "eval-v2.jsonl"
    own = ("datasets", "test_datasets", "adapterhub")
    assert {k: v for k, v in first.items() if k not in own} == {k: v for k, v in second.items() if k not in own}
    assert first["adapterhub"]["name"] == second["adapterhub"]["name"]


@pytest.mark.parametrize("file", sorted(EXAMPLES.glob("*/config*.yml")), ids=lambda f: f"{f.parent.name}/{f.stem}")
def test_every_key_of_a_config_is_honoured(file: Path) -> None:
    reading = read_config(read_yaml(file))
    assert {fate.key for fate in reading.fates if fate.kind != "honoured"} == set()
    for source in (*reading.config.datasets, *reading.config.test_datasets):
        assert (file.parent / source.path).is_file()


def test_the_two_examples_belong_to_different_tenants() -> None:
    names = {read_config(read_yaml(file)).config.name for file in EXAMPLES.glob("*/config.yml")}
    assert len({name.tenant for name in names if name}) == 2
