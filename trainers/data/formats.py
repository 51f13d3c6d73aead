"""The formats: each by the name that ``type`` has in a config, and told from a row's columns where it has none.

A row that could be two formats is none: which one is meant has to be said.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

from adapterhub.trainers.config import DataSource, Method, UserFormat
from adapterhub.trainers.data.chat import ChatReader, is_sharegpt
from adapterhub.trainers.data.instruct import STYLES, InstructionReader, PromptReader, StyledReader, UserReader
from adapterhub.trainers.data.plain import SegmentsReader, TextReader, TokensReader
from adapterhub.trainers.data.preferences import PreferenceReader
from adapterhub.trainers.data.rows import BadRow, Preference, Row


class Reader(Protocol):
    """Turns one raw row into a `Row`. Raises BadRow."""

    @property
    def columns(self) -> frozenset[str]:
        """What it looks at; other columns are named as not used."""

    def __call__(self, raw: Mapping[str, Any], where: str) -> Row | Preference: ...


@dataclass(frozen=True)
class Format:
    """``shown``: as it is called in front of people."""

    shown: str
    reader: Callable[[DataSource], Reader]


FORMATS: Mapping[str, Format] = {
    "chat_template": Format("messages", lambda s: ChatReader(s, sharegpt=False, key="messages")),
    "sharegpt": Format("sharegpt", lambda s: ChatReader(s, sharegpt=True, key="conversations")),
    "prompt_completion": Format("prompt/completion", PromptReader),
    "question_answer": Format("question/answer", lambda s: InstructionReader(s, "question", "answer")),
    "instruction": Format("instruction/output", lambda s: InstructionReader(s, "instruction", "output")),
    **{
        name: Format(f"{name} prompts", lambda s, style=style: StyledReader(s, style))  # type: ignore[misc]
        for name, style in STYLES.items()
    },
    "completion": Format("text", TextReader),
    "input_output": Format("segments", SegmentsReader),
    "tokens": Format("token ids", TokensReader),
}


def format_of(source: DataSource, raw: Mapping[str, Any], method: Method | None = None) -> tuple[str, Reader]:
    """What the rows of a data set are, shown, and what reads them. Raises BadRow: the first row is no known format."""
    if method is not None:
        reader = PreferenceReader(source, raw)
        if reader.fields.judged and method != "kto":
            raise BadRow(f"answers with a label, and rl is {method}", "chosen and rejected; or rl: kto for these")
        return reader.shown, reader
    if isinstance(source.type, UserFormat):
        return "your format", UserReader(source, source.type)
    if source.type == "alpaca_chat.load_qa":  # Axolotl's name
        return FORMATS["question_answer"].shown, FORMATS["question_answer"].reader(source)
    if isinstance(source.type, str):
        return FORMATS[source.type].shown, FORMATS[source.type].reader(source)
    return _told(source, raw)


def _told(source: DataSource, raw: Mapping[str, Any]) -> tuple[str, Reader]:
    found = _candidates(source, raw)
    if len(found) > 1:
        names = list(found)
        types = " or ".join(f"`type: {found[name][0]}`" for name in names)
        raise BadRow(f"both {names[0]} and {names[1]}", f"one of the two, or {types}")
    if found:
        name, reader = next(iter(found.values()))
        return FORMATS[name].shown, reader
    columns = ", ".join(str(key) for key in list(raw)[:8]) or "nothing"
    if {"chosen", "rejected"} <= raw.keys():
        raise BadRow(f"preference pairs, the row has {columns}", "rl: dpo (ipo, orpo, simpo) in the config for these")
    raise BadRow(
        f"no known format, the row has {columns}",
        "messages, conversations, instruction and output, question and answer, prompt and completion, text, segments "
        "or input_ids; or name the columns: type: {field_instruction: …, field_output: …}",
    )


def _candidates(source: DataSource, raw: Mapping[str, Any]) -> dict[str, tuple[str, Reader]]:
    """Columns → the type that reads them."""
    found: dict[str, tuple[str, Reader]] = {}
    for key in [source.field_messages] if source.field_messages else ["messages", "conversations", "conversation"]:
        if key in raw:
            sharegpt = not source.message_property_mappings and is_sharegpt(raw[key], key)
            name = "sharegpt" if sharegpt else "chat_template"
            found[key] = (name, ChatReader(source, sharegpt=sharegpt, key=key))
    if "input_ids" in raw:
        found["input_ids"] = ("tokens", TokensReader(source))
    if "segments" in raw:
        found["segments"] = ("input_output", SegmentsReader(source))
    pairs = {
        "prompt_completion": ("prompt", "completion"),
        "question_answer": ("question", "answer"),
        "instruction": (source.field_instruction or "instruction", source.field_output or "output"),
    }
    for name, columns in pairs.items():
        if raw.keys() >= set(columns):
            found["/".join(columns)] = (name, FORMATS[name].reader(source))
    text = source.field or "text"
    if text in raw and (source.field or not found):
        found[text] = ("completion", TextReader(source))
    return found
