"""Reads data files whole and strictly, before any model is loaded.

A row is a `Conversation` (``messages``, or ShareGPT ``conversations``) or a `Text` (``prompt`` and ``completion``).
Every bad row is named as ``file:line``, with what was expected. Nothing here knows tokens.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from adapterhub.errors import DataError
from adapterhub.trainers.config import DataSource
from adapterhub.trainers.data.rows import ROLES, BadRow, Conversation, Row, Text, kind, quoted
from adapterhub.trainers.data.strictjson import parse_object
from adapterhub.trainers.data.tools import check_called, read_tools, tool_calls

_SHAREGPT = {
    "human": "user",
    "user": "user",
    "gpt": "assistant",
    "assistant": "assistant",
    "system": "system",
    "tool": "tool",
    "observation": "tool",
}
_SHOWN_ERRORS = 5


@dataclass(frozen=True)
class DataFile:
    """One file, read and checked."""

    path: Path
    sha256: str
    format: str  # "messages", "sharegpt" or "prompt/completion"
    detected: bool  # told from the first row rather than from the config
    rows: tuple[Row, ...]


def read_source(source: DataSource, *, beside: Path | None = None) -> DataFile:
    """Read one entry of ``datasets``.

    Args:
        beside: the config file's folder, where a relative path is looked up first; then in the working directory.

    Raises:
        DataError: the file is missing, unreadable, empty, of no known format, or has bad rows (the first five named).
    """
    path = _find(source.path, beside)
    digest = hashlib.sha256()
    rows: list[Row] = []
    bad: list[tuple[int, BadRow]] = []
    found = source.type
    for number, line in _lines(path, digest):
        try:
            raw = parse_object(line)
            found = found or _format_of(raw, source)
            rows.append(_row(raw, found, source, f"{path}:{number}"))
        except BadRow as error:
            bad.append((number, error))
    if bad:
        raise _bad_rows(path, bad, len(rows) + len(bad))
    if not rows:
        raise DataError(f"{path} is empty", why="it holds no rows", hint="write one JSON object a line")
    return DataFile(path, digest.hexdigest(), _SHOWN[found or ""], source.type is None, tuple(rows))


_SHOWN = {"chat_template": "messages", "sharegpt": "sharegpt", "prompt_completion": "prompt/completion"}


# ── files and lines ──────────────────────────────────────────────────────────────────────────────────────────


def _find(written: str, beside: Path | None) -> Path:
    here = Path(written).expanduser()
    choices = [here] if here.is_absolute() or beside is None else [beside / here, here]
    for path in choices:
        if path.is_file():
            return path
    if any(path.is_dir() for path in choices):
        raise DataError(f"{written} is a folder", hint="name a JSONL file in it")
    raise DataError(
        f"the data file {written} was not found",
        why="looked for " + " and ".join(str(path) for path in choices),
        hint="check datasets: path, or name it with --data",
    )


def _lines(path: Path, digest: Any) -> Iterator[tuple[int, bytes]]:
    """Lines that hold something, with their numbers from 1; blank ones are no rows."""
    try:
        with path.open("rb") as file:
            for number, line in enumerate(file, 1):
                digest.update(line)
                line = line.removeprefix(b"\xef\xbb\xbf") if number == 1 else line
                if line.strip():
                    yield number, line
    except OSError as error:
        raise DataError(f"{path} cannot be read", why=error.strerror or str(error)) from error


def _bad_rows(path: Path, bad: list[tuple[int, BadRow]], total: int) -> DataError:
    line, first = bad[0]
    why = f"expected {first.expected}" if first.expected else ""
    if len(bad) > 1:
        others = ", ".join(str(number) for number, _ in bad[1:_SHOWN_ERRORS])
        more = f" and {len(bad) - _SHOWN_ERRORS} more" if len(bad) > _SHOWN_ERRORS else ""
        why += f"{'; ' if why else ''}{len(bad)} of {total} rows are bad, also line{'s'[: len(bad) > 2]} {others}{more}"
    return DataError(f"{path}:{line}: {first.what}", why=why, hint=f"look at it: sed -n {line}p {path}")


# ── rows ─────────────────────────────────────────────────────────────────────────────────────────────────────


def _format_of(raw: Mapping[str, Any], source: DataSource) -> str:
    chat = source.field_messages or "messages"
    pair = "prompt" in raw and "completion" in raw
    if chat in raw and pair:
        raise BadRow(
            f"both {chat} and prompt/completion", "one of the two, or `type: chat_template` or `prompt_completion`"
        )
    if chat in raw:
        return "chat_template"
    if "conversations" in raw:
        return "sharegpt"
    if pair:
        return "prompt_completion"
    found = ", ".join(str(key) for key in list(raw)[:6]) or "nothing"
    raise BadRow(f"no known format, the row has {found}", f"{chat}, or prompt and completion")


def _row(raw: Mapping[str, Any], format: str, source: DataSource, where: str) -> Row:
    if format == "prompt_completion":
        return _pair(raw, source, where)
    key = source.field_messages or ("conversations" if format == "sharegpt" else "messages")
    if key not in raw:
        raise BadRow(f"no {key}", f"{key}: a list of messages")
    messages = _messages(raw[key], key, format, source)
    tools = read_tools(raw.get(source.field_tools))
    check_called(messages, tools, key)
    return Conversation(_checked(messages, key), where, tools)


def _pair(raw: Mapping[str, Any], source: DataSource, where: str) -> Row:
    prompt, completion = raw.get("prompt"), raw.get("completion")
    if isinstance(prompt, list) and isinstance(completion, list):
        before = _messages(prompt, "prompt", "chat_template", source)
        after = _messages(completion, "completion", "chat_template", source)
        messages = _checked(before + after, "completion", first=len(before))
        return Conversation(messages, where, read_tools(raw.get(source.field_tools)), first_trained=len(before))
    for key, value in (("prompt", prompt), ("completion", completion)):
        if not isinstance(value, str):
            raise BadRow(
                f"{key} is {'missing' if value is None else kind(value)}",
                "prompt and completion as text, or both as lists of messages",
            )
    if not completion:
        raise BadRow("completion is empty", "text to train on")
    return Text(str(prompt), str(completion), where)


def _messages(value: Any, key: str, format: str, source: DataSource) -> list[dict[str, Any]]:
    if not isinstance(value, list) or not value:
        raise BadRow(f"{key} is {kind(value) if not isinstance(value, list) else 'empty'}", "a list of messages")
    sharegpt = format == "sharegpt"
    role_key = source.role_property or ("from" if sharegpt else "role")
    text_key = source.content_property or ("value" if sharegpt else "content")
    mapping = dict(source.roles) if source.roles else _SHAREGPT if sharegpt else {}
    return [_message(m, f"{key}[{i}]", role_key, text_key, mapping) for i, m in enumerate(value)]


def _message(raw: Any, at: str, role_key: str, text_key: str, mapping: Mapping[str, str]) -> dict[str, Any]:
    if not isinstance(raw, dict):
        raise BadRow(f"{at} is {kind(raw)}", f"an object with {role_key} and {text_key}")
    role = raw.get(role_key)
    role = mapping.get(role, role) if isinstance(role, str) else role
    if role not in ROLES:
        shown = "missing" if role is None else quoted(role)
        raise BadRow(f"{at}.{role_key} is {shown}", "one of " + ", ".join([*mapping] or ROLES))
    content, calls = raw.get(text_key), raw.get("tool_calls")
    message = {k: v for k, v in raw.items() if k not in (role_key, text_key, "tool_calls") and v is not None}
    message |= {"role": role, "content": "" if content is None and calls else content}
    if calls:
        if role != "assistant":
            raise BadRow(f"{at} has tool_calls, and its role is {role}", "tool_calls in assistant messages only")
        message["tool_calls"] = tool_calls(calls, f"{at}.tool_calls")
    if not isinstance(message["content"], str):
        raise BadRow(f"{at}.{text_key} is {'missing' if content is None else kind(content)}", "text")
    return message


def _checked(messages: list[dict[str, Any]], key: str, first: int = 0) -> tuple[Mapping[str, Any], ...]:
    answers = [(i, m) for i, m in enumerate(messages) if m["role"] == "assistant" and i >= first]
    if not answers:
        raise BadRow(f"{key} has no assistant message", "at least one: it is what is trained on")
    for i, message in answers:
        if not message["content"].strip() and not message.get("tool_calls"):
            raise BadRow(f"{key}[{i - first}] is an empty assistant message", "text, or tool_calls")
    return tuple(messages)
