"""Which keys of a data set its type reads: a column that is named for rows of another kind would be passed over."""

from __future__ import annotations

from collections.abc import Mapping

from adapterhub.trainers.config import UserFormat, UserPreference

_TURNS = frozenset({"roles_to_train", "train_on_eos", "train_on_eot", "drop_system_message"})
_MESSAGES = _TURNS | {"field_tools", "message_property_mappings", "roles", "message_field_training"}
_EXCHANGE = frozenset({"field_instruction", "field_input", "field_output", "field_system"})
_COMPARED = frozenset({"field_prompt", "field_chosen", "field_rejected", "field_completion", "field_label"})
_READ: Mapping[str, frozenset[str]] = {
    "chat_template": _MESSAGES | {"field_messages", "field_system"},
    "sharegpt": _MESSAGES | {"field_messages", "field_system"},
    "prompt_completion": _MESSAGES,
    "instruction": _EXCHANGE | _TURNS,
    "question_answer": _EXCHANGE | _TURNS,
    "alpaca_chat.load_qa": _EXCHANGE | _TURNS,
    **dict.fromkeys(("alpaca", "alpaca:chat", "alpaca:chatml", "alpaca:phi"), _EXCHANGE),
    "completion": frozenset({"field"}),
    "input_output": frozenset(),
    "tokens": frozenset(),
}
_OF_ROWS = _MESSAGES | _EXCHANGE | _COMPARED | {"field_messages", "field"}


def unread(key: str, kind: str | UserFormat | UserPreference | None, *, rl: bool) -> str:
    """Why rows of this type have no use for the key; empty where they do, or where the rows themselves will tell."""
    if rl or key not in _OF_ROWS:
        return ""
    if key in _COMPARED:
        return "it is for preferences, which rl trains on"
    if isinstance(kind, UserFormat):
        read = _EXCHANGE if kind.format else _EXCHANGE | _TURNS
        return "" if key in read else "your format has no such column"
    if not isinstance(kind, str) or key in _READ.get(kind, _OF_ROWS):
        return ""
    return f"rows of type {kind} have none"
