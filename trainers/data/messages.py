"""Chat messages in any spelling → ``{"role", "content", "tool_calls", …}``, as chat templates take them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from adapterhub.trainers.config import DataSource
from adapterhub.trainers.data.rows import ROLES, BadRow, kind, quoted
from adapterhub.trainers.data.strictjson import parse
from adapterhub.trainers.data.tools import one_call, tool_calls

_ROLES = {role: role for role in ROLES} | {
    "human": "user",
    "gpt": "assistant",
    "bot": "assistant",
    "function": "tool",
    "observation": "tool",
    "tool_response": "tool",
    "function_call": "assistant",
}


@dataclass(frozen=True)
class Spelling:
    """How the messages of one data set are written."""

    properties: Mapping[str, str]  # ours → theirs
    roles: Mapping[str, str]  # theirs → ours

    @classmethod
    def of(cls, source: DataSource, *, sharegpt: bool) -> Spelling:
        usual = {"role": "from", "content": "value"} if sharegpt else {"role": "role", "content": "content"}
        return cls(usual | dict(source.message_property_mappings), dict(source.roles) or _ROLES)


def as_list(value: Any, key: str) -> list[Any]:
    """A list, or its JSON text as CSV and Parquet files hold it. Raises BadRow."""
    if isinstance(value, str) and value.lstrip().startswith("["):
        value = parse(value.encode())
    if not isinstance(value, list):
        raise BadRow(f"{key} is {kind(value)}", "a list of messages")
    if not value:
        raise BadRow(f"{key} is empty", "a list of messages")
    return value


def read_messages(value: Any, key: str, spelling: Spelling) -> list[dict[str, Any]]:
    """Raises BadRow: named as ``key[place]``."""
    return [_message(raw, f"{key}[{i}]", spelling) for i, raw in enumerate(as_list(value, key))]


def _message(raw: Any, at: str, spelling: Spelling) -> dict[str, Any]:
    role_key, text_key = spelling.properties["role"], spelling.properties["content"]
    if not isinstance(raw, dict):
        raise BadRow(f"{at} is {kind(raw)}", f"an object with {role_key} and {text_key}")
    written = raw.get(role_key)
    role = spelling.roles.get(written) if isinstance(written, str) else None
    if role is None or role not in ROLES:
        shown = "missing" if written is None else quoted(written)
        raise BadRow(f"{at}.{role_key} is {shown}", "one of " + ", ".join(spelling.roles))
    message: dict[str, Any] = {"role": role, "content": raw.get(text_key)}
    if len(raw) > 2 or text_key not in raw:
        theirs = {their: our for our, their in spelling.properties.items()}
        for name, inner in raw.items():
            if inner is not None and name != role_key and name != text_key:
                message[str(theirs.get(name, name))] = inner
    if written == "function_call":  # its text is the call
        message |= {"content": "", "tool_calls": [one_call(message["content"], f"{at}.{text_key}")]}
    elif len(message) > 2:
        _calls(message, at)
    if not isinstance(message["content"], str):
        message["content"] = _content(message, f"{at}.{text_key}")
    return message


def _calls(message: dict[str, Any], at: str) -> None:
    if "function_call" in message:  # OpenAI's older spelling
        message["tool_calls"] = [one_call(message.pop("function_call"), f"{at}.function_call")]
    if not message.get("tool_calls"):
        message.pop("tool_calls", None)
        return
    if message["role"] != "assistant":
        raise BadRow(f"{at} has tool_calls, and its role is {message['role']}", "tool_calls in assistant messages only")
    message["tool_calls"] = tool_calls(message["tool_calls"], f"{at}.tool_calls")


def _content(message: Mapping[str, Any], at: str) -> str:
    content = message["content"]
    if content is None and message.get("tool_calls"):
        return ""
    if not isinstance(content, list) or not content:
        raise BadRow(f"{at} is {kind(content)}", "text")
    parts = []
    for i, part in enumerate(content):
        text = part.get("text") if isinstance(part, dict) else None
        if not isinstance(text, str):
            what = part.get("type") if isinstance(part, dict) else None
            raise BadRow(f"{at}[{i}] is {what or kind(part)}", "text parts only: images and sound are not trained on")
        parts.append(text)
    return "".join(parts)
