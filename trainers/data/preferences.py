"""Preference data: two answers to one prompt, or one answer and whether it is good.

One reader for what Axolotl calls ``llama3.*``, ``chatml.*`` and ``chat_template.*`` and for the shapes of the Hub:

    prompt     messages, or text in prompt, question, instruction (with input) or input; a system column or not
    answers    chosen and rejected (or …_response), completion and label: text, a message, or a list of messages;
               or both answers as whole conversations that begin the same

Where the columns are is told from the first row; every row then has to be that.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from adapterhub.trainers.config import DataSource, UserPreference
from adapterhub.trainers.data.chat import conversation, is_sharegpt, system_first
from adapterhub.trainers.data.instruct import filled, optional_text
from adapterhub.trainers.data.messages import Spelling, read_messages
from adapterhub.trainers.data.rows import BadRow, Conversation, Judged, Pair, Text, kind, quoted, text_of

_PROMPTS = ("prompt", "question", "instruction", "input", "messages", "conversation", "conversations")
_TRUTH = {"true": True, "false": False, "1": True, "0": False}  # as CSV writes it


@dataclass(frozen=True)
class Fields:
    """Columns of one data set. ``prompt`` None: the answers are whole conversations."""

    prompt: str | None
    system: str
    chosen: str
    rejected: str
    completion: str
    label: str
    judged: bool  # completion and label, rather than chosen and rejected

    @classmethod
    def of(cls, source: DataSource, raw: Mapping[str, Any]) -> Fields:
        """Told from the config and the first row. Raises BadRow."""
        user = source.type if isinstance(source.type, UserPreference) else UserPreference()
        chosen = user.field_chosen or source.field_chosen or _first(raw, ("chosen", "chosen_response"))
        rejected = user.field_rejected or source.field_rejected or _first(raw, ("rejected", "rejected_response"))
        completion = user.field_completion or source.field_completion or "completion"
        label = user.field_label or source.field_label or "label"
        judged = completion in raw and label in raw
        if not judged and (chosen not in raw or rejected not in raw):
            columns = ", ".join(str(key) for key in list(raw)[:8]) or "nothing"
            raise BadRow(
                f"no preferences, the row has {columns}",
                "prompt, chosen and rejected, or prompt, completion and label; or name the columns: "
                "field_prompt, field_chosen, field_rejected",
            )
        named = user.field_prompt or source.field_prompt or source.field_messages
        whole = _is_whole(raw.get(completion if judged else chosen), source)
        found = named or (None if whole else next((key for key in _PROMPTS if key in raw), None))
        if found is None and not whole:
            raise BadRow("no prompt", f"one of {', '.join(_PROMPTS[:5])}; or name its column: field_prompt")
        system = user.field_system or source.field_system or "system"
        return cls(found, system, chosen, rejected, completion, label, judged)


class PreferenceReader:
    """Rows of preference data. ``text``: they are plain text, and no template writes them."""

    def __init__(self, source: DataSource, raw: Mapping[str, Any]) -> None:
        self.source, self.fields = source, Fields.of(source, raw)
        self.user = source.type if isinstance(source.type, UserPreference) else None
        self.text = self._is_text(raw)
        answers = self._answers()
        lists = [
            raw[key] for key in (self.fields.prompt, *answers) if key is not None and isinstance(raw.get(key), list)
        ]
        sharegpt = not source.message_property_mappings and any(
            is_sharegpt(value, "messages") for value in lists if value
        )
        self.spelling = Spelling.of(source, sharegpt=sharegpt)
        used = {*answers, self.fields.prompt or "prompt", self.fields.system, source.field_tools}
        used |= {self.fields.label} if self.fields.judged else set()
        used |= {"input"} if self.fields.prompt == "instruction" else set()
        self.columns = frozenset(used)

    @property
    def shown(self) -> str:
        kind = "answers with a label" if self.fields.judged else "pairs of answers"
        return f"{kind}, plain text" if self.text else kind

    def __call__(self, raw: Mapping[str, Any], where: str) -> Pair | Judged:
        if self.fields.judged:
            good = _truth(raw.get(self.fields.label), self.fields.label)
            return Judged(self._judged(raw, where), good, where)
        chosen, rejected = (self._text if self.text else self._chat)(raw, where)
        if chosen == rejected:
            raise BadRow(f"{self.fields.chosen} and {self.fields.rejected} are the same", "two different answers")
        return Pair(chosen, rejected, where)

    def _answers(self) -> tuple[str, ...]:
        fields = self.fields
        return (fields.completion,) if fields.judged else (fields.chosen, fields.rejected)

    def _is_text(self, raw: Mapping[str, Any]) -> bool:
        if self.user is not None:
            return self.user.prompt_format is not None
        plain = self.source.type is None and self.fields.prompt == "prompt" and not raw.get(self.fields.system)
        return plain and all(isinstance(raw.get(key), str) for key in ("prompt", *self._answers()))

    # ── plain text ──

    def _text(self, raw: Mapping[str, Any], where: str) -> list[Text]:
        prompt = text_of(raw, self.fields.prompt or "prompt")
        answers = [text_of(raw, key, empty=False) for key in self._answers()]
        if self.user is None or self.user.prompt_format is None:
            return [Text(prompt, answer, where) for answer in answers]
        system = optional_text(raw, self.fields.system)
        prompt = filled(self.user.prompt_format, prompt=prompt, system=system)
        names = ("completion",) if self.fields.judged else ("chosen", "rejected")
        forms = [getattr(self.user, f"{name}_format") for name in names]
        return [
            Text(prompt, filled(form, **{name: answer}), where)
            for form, name, answer in zip(forms, names, answers, strict=True)
        ]

    # ── conversations ──

    def _judged(self, raw: Mapping[str, Any], where: str) -> Conversation | Text:
        if self.text:
            return self._text(raw, where)[0]
        messages = self._messages(raw, self.fields.completion)
        if self.fields.prompt is not None:
            before = self._prompt(raw)
            return self._row(before + messages, len(before), raw, where, self.fields.completion)
        start = len(messages)
        while start and messages[start - 1]["role"] == "assistant":
            start -= 1
        return self._row(messages, start, raw, where, self.fields.completion)

    def _chat(self, raw: Mapping[str, Any], where: str) -> list[Conversation]:
        keys = self._answers()
        if self.fields.prompt is not None:
            rows = []
            for key in keys:
                before = self._prompt(raw)  # read for each side: a row's messages are its own
                rows.append(self._row(before + self._messages(raw, key), len(before), raw, where, key))
            return rows
        sides = [self._messages(raw, key) for key in keys]
        common = _common(*sides)
        for key, messages in zip(keys, sides, strict=True):
            if common < len(messages) and messages[common]["role"] != "assistant":
                raise BadRow(f"chosen and rejected part at {key}[{common}], a {messages[common]['role']} message",
                             "the same messages up to the answer")  # fmt: skip
            if common == len(messages):
                raise BadRow(f"{key} has no answer of its own", "two different answers after the same messages")
        return [self._row(messages, common, raw, where, key) for key, messages in zip(keys, sides, strict=True)]

    def _row(
        self, messages: list[dict[str, Any]], first: int, raw: Mapping[str, Any], where: str, key: str
    ) -> Conversation:
        if raw.get(self.fields.system):
            before = len(messages)
            messages = system_first(messages, text_of(raw, self.fields.system), self.fields.system, key)
            first += len(messages) - before
        return conversation(messages, raw, where, source=self.source, key=key, first=first)

    def _prompt(self, raw: Mapping[str, Any]) -> list[dict[str, Any]]:
        key = self.fields.prompt
        assert key is not None
        value = raw.get(key)
        if isinstance(value, list):
            messages = read_messages(value, key, self.spelling)
            if messages[-1]["role"] == "assistant":
                raise BadRow(f"{key} ends with an assistant message", "a user or tool message last, then the answers")
            return messages
        text = text_of(raw, key, empty=False)
        given = optional_text(raw, "input") if key == "instruction" else ""
        return [{"role": "user", "content": f"{text}\n\n{given}" if given else text}]

    def _messages(self, raw: Mapping[str, Any], key: str) -> list[dict[str, Any]]:
        """One answer: text, a message, or a list of messages; a whole conversation where there is no prompt."""
        value = raw.get(key)
        if isinstance(value, str) and not value.lstrip().startswith("["):
            return [{"role": "assistant", "content": text_of(raw, key, empty=False)}]
        if isinstance(value, dict):
            value = [value]
        if not isinstance(value, list | str):
            raise BadRow(f"{key} is {kind(value)}", "text, a message or a list of messages")
        messages = read_messages(value, key, self.spelling)
        wrong = next((i for i, m in enumerate(messages) if m["role"] not in ("assistant", "tool")), None)
        if self.fields.prompt is not None and wrong is not None:
            return self._without_prompt(messages, key)
        return messages

    def _without_prompt(self, messages: list[dict[str, Any]], key: str) -> list[dict[str, Any]]:
        """UltraFeedback has the prompt twice: in its column, and at the start of both answers."""
        start = next((i for i, m in enumerate(messages) if m["role"] == "assistant"), len(messages))
        after = messages[start:]
        if not after or any(m["role"] not in ("assistant", "tool") for m in after):
            raise BadRow(f"{key} holds more than the answer", f"only the messages after {self.fields.prompt}")
        return after


def _first(raw: Mapping[str, Any], names: Sequence[str]) -> str:
    return next((name for name in names if name in raw), names[0])


def _is_whole(value: Any, source: DataSource) -> bool:
    """Whether an answer begins with the prompt: a list of messages whose first is not the assistant's."""
    if not isinstance(value, list) or not value or not isinstance(value[0], dict):
        return False
    sharegpt = not source.message_property_mappings and "from" in value[0] and "role" not in value[0]
    spelling = Spelling.of(source, sharegpt=sharegpt)
    written = str(value[0].get(spelling.properties["role"]))
    return spelling.roles.get(written) in {"system", "developer", "user"}


def _common(first: Sequence[Mapping[str, Any]], second: Sequence[Mapping[str, Any]]) -> int:
    """Messages that two conversations begin with in common."""
    return next(
        (i for i, (a, b) in enumerate(zip(first, second, strict=False)) if a != b), min(len(first), len(second))
    )


def _truth(value: Any, key: str) -> bool:
    if isinstance(value, bool) or value in (0, 1):
        return bool(value)
    if isinstance(value, str) and value.strip().lower() in _TRUTH:
        return _TRUTH[value.strip().lower()]
    raise BadRow(f"{key} is {'missing' if value is None else quoted(value)}", "true or false (or 1 or 0)")
