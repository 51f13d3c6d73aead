"""What a row is once it is read: one of four shapes, or a judgement about one or two of them, each with its place."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal, TypeVar

Ends = Literal["turn", "all", "last", "none"]  # of which turns the end token is trained on

ROLES = ("system", "developer", "user", "assistant", "tool")


@dataclass(frozen=True)
class Conversation:
    """Chat messages as chat templates take them."""

    messages: tuple[Mapping[str, Any], ...]
    where: str  # file:line
    tools: tuple[Mapping[str, Any], ...] = ()
    trained: tuple[int, ...] | None = None  # places of the messages to train on; None: all of the assistant
    ends: Ends = "turn"

    @property
    def trained_places(self) -> tuple[int, ...]:
        if self.trained is not None:
            return self.trained
        return tuple(i for i, message in enumerate(self.messages) if message["role"] == "assistant")


@dataclass(frozen=True)
class Text:
    """Plain text without a template: the completion is trained on, and the end after it."""

    prompt: str
    completion: str
    where: str
    splits: bool = False  # longer than a row may be: several rows, instead of dropped


@dataclass(frozen=True)
class Segments:
    """Text in pieces, each with whether it is trained on. Nothing is added, no end token either."""

    pieces: tuple[tuple[str, bool], ...]
    where: str


@dataclass(frozen=True)
class Tokens:
    """Token ids and labels that somebody else made. ``labels``: the ids, or -100 where not trained on."""

    input_ids: tuple[int, ...]
    labels: tuple[int, ...]
    where: str


@dataclass(frozen=True)
class Pair:
    """Two answers to one prompt. Each side holds the prompt; what is trained on is its answer."""

    chosen: Conversation | Text
    rejected: Conversation | Text
    where: str


@dataclass(frozen=True)
class Judged:
    """One answer, and whether it is one to give."""

    answer: Conversation | Text
    good: bool
    where: str


Row = Conversation | Text | Segments | Tokens
Preference = Pair | Judged


def is_chat(row: Row | Preference) -> bool:
    """Whether a chat template writes it."""
    if isinstance(row, Pair):
        return isinstance(row.chosen, Conversation)
    return isinstance(row.answer if isinstance(row, Judged) else row, Conversation)


def with_system(row: Row | Preference, text: str) -> Row | Preference:
    """A conversation without a system message gets this one; other rows have no place for it."""
    if isinstance(row, Pair):
        return replace(row, chosen=_with_system(row.chosen, text), rejected=_with_system(row.rejected, text))
    if isinstance(row, Judged):
        return replace(row, answer=_with_system(row.answer, text))
    return _with_system(row, text)


_Row = TypeVar("_Row", bound=Row)


def _with_system(row: _Row, text: str) -> _Row:
    if not isinstance(row, Conversation) or row.messages[0]["role"] in ("system", "developer"):
        return row
    trained = None if row.trained is None else tuple(i + 1 for i in row.trained)
    return replace(row, messages=({"role": "system", "content": text}, *row.messages), trained=trained)


class BadRow(ValueError):
    """What is wrong with a row, and what was expected."""

    def __init__(self, what: str, expected: str = "") -> None:
        super().__init__(what)
        self.what, self.expected = what, expected


def kind(value: Any) -> str:
    """A value's type in a user's words."""
    names = {dict: "an object", list: "a list", str: "text", bool: "true or false", type(None): "missing"}
    return names.get(type(value), "a number" if isinstance(value, int | float) else f"a {type(value).__name__}")


def text_of(raw: Mapping[str, Any], key: str, *, empty: bool = True) -> str:
    """The text in a column. Raises BadRow: it is missing, no text, or empty where ``empty`` is not allowed."""
    value = raw.get(key)
    if not isinstance(value, str):
        raise BadRow(f"{key} is {kind(value)}", "text")
    if not empty and not value.strip():
        raise BadRow(f"{key} is empty", "text to train on")
    return value


def quoted(value: Any) -> str:
    """As in the file, cut to what fits a message."""
    return json.dumps(value, ensure_ascii=False, default=str)[:40]
