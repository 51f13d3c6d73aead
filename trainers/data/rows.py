"""What a row is once it is read, and what is said of one that is bad."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

ROLES = ("system", "developer", "user", "assistant", "tool")


@dataclass(frozen=True)
class Conversation:
    """Chat messages as chat templates take them. Assistant messages from ``first_trained`` on are trained on."""

    messages: tuple[Mapping[str, Any], ...]
    where: str  # file:line
    tools: tuple[Mapping[str, Any], ...] = ()
    first_trained: int = 0


@dataclass(frozen=True)
class Text:
    """Plain text without a template: the completion is trained on."""

    prompt: str
    completion: str
    where: str


Row = Conversation | Text


class BadRow(ValueError):
    """What is wrong with a row, and what was expected."""

    def __init__(self, what: str, expected: str = "") -> None:
        super().__init__(what)
        self.what, self.expected = what, expected


def kind(value: Any) -> str:
    """A value's type in a user's words."""
    names = {dict: "an object", list: "a list", str: "text", bool: "true or false", type(None): "null"}
    return names.get(type(value), "a number")


def quoted(value: Any) -> str:
    """As in the file, cut to what fits a message."""
    return json.dumps(value, ensure_ascii=False, default=str)[:40]
