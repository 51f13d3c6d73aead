"""Rows that are conversations: ``messages``, ShareGPT, and lists of messages as prompt and completion."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from adapterhub.trainers.config import DataSource
from adapterhub.trainers.data.messages import Spelling, as_list, read_messages
from adapterhub.trainers.data.rows import BadRow, Conversation, kind, quoted, text_of
from adapterhub.trainers.data.tools import check_called, read_tools


class ChatReader:
    """Rows with one list of messages, and their tools and system message in columns of their own."""

    def __init__(self, source: DataSource, *, sharegpt: bool, key: str) -> None:
        self.source, self.key = source, source.field_messages or key
        self.spelling = Spelling.of(source, sharegpt=sharegpt)
        self.system = source.field_system or "system"
        self.columns = frozenset({self.key, source.field_tools, self.system})

    def __call__(self, raw: Mapping[str, Any], where: str) -> Conversation:
        if self.key not in raw:
            raise BadRow(f"no {self.key}", f"{self.key}: a list of messages")
        messages = read_messages(raw[self.key], self.key, self.spelling)
        if raw.get(self.system):
            messages = system_first(messages, text_of(raw, self.system), self.system, self.key)
        return conversation(messages, raw, where, source=self.source, key=self.key)


class PairReader:
    """``prompt`` and ``completion`` that are lists of messages: the completion is trained on."""

    def __init__(self, source: DataSource) -> None:
        self.source, self.spelling = source, Spelling.of(source, sharegpt=False)
        self.columns = frozenset({"prompt", "completion", source.field_tools})

    def __call__(self, raw: Mapping[str, Any], where: str) -> Conversation:
        before = read_messages(raw["prompt"], "prompt", self.spelling)
        after = read_messages(raw["completion"], "completion", self.spelling)
        return conversation(before + after, raw, where, source=self.source, key="completion", first=len(before))


def conversation(
    messages: list[dict[str, Any]],
    raw: Mapping[str, Any],
    where: str,
    *,
    source: DataSource,
    key: str,
    first: int = 0,
) -> Conversation:
    """A checked row. ``first``: the place of the first message that may be trained on. Raises BadRow."""
    tools = read_tools(raw.get(source.field_tools))
    check_called(messages, tools, key)
    if source.drop_system_message and messages[0]["role"] == "system":
        messages, first = messages[1:], max(first - 1, 0)
    trained = tuple(i for i in _trained(messages, source, key) if i >= first)
    if not trained:
        roles = " or ".join(source.roles_to_train)
        raise BadRow(f"{key} has no {roles} message", "at least one: it is what is trained on")
    for i in trained:
        message = messages[i]
        if not message["content"].strip() and not message.get("tool_calls"):
            raise BadRow(f"{key}[{i - first}] is an empty {message['role']} message", "text, or tool_calls")
    return Conversation(tuple(messages), where, tools, trained, source.train_on_eot or source.train_on_eos)


def _trained(messages: Sequence[dict[str, Any]], source: DataSource, key: str) -> list[int]:
    """Places of the messages to train on: by role, unless the message says so itself (``weight``, as OpenAI has it)."""
    switch = source.message_field_training or "weight"
    found = []
    for i, message in enumerate(messages):
        chosen = message["role"] in source.roles_to_train
        if switch in message:
            value = message.pop(switch)
            if not isinstance(value, int | float) or value not in (0, 1):
                raise BadRow(f"{key}[{i}].{switch} is {quoted(value)}", "true or false (or 1 or 0)")
            chosen = bool(value)
        if chosen:
            found.append(i)
    return found


def system_first(messages: list[dict[str, Any]], text: str, column: str, key: str) -> list[dict[str, Any]]:
    if messages[0]["role"] == "system":
        if messages[0]["content"] == text:
            return messages
        raise BadRow(f"both {column} and a system message in {key}", "one of the two")
    return [{"role": "system", "content": text}, *messages]


def is_sharegpt(value: Any, key: str) -> bool:
    """Whether messages are written with ``from`` and ``value``. Raises BadRow."""
    first = as_list(value, key)[0]
    if not isinstance(first, dict):
        raise BadRow(f"{key}[0] is {kind(first)}", "an object with role and content")
    return "from" in first and "role" not in first
