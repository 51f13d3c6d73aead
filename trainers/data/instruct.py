"""Rows of columns: instruction and output, question and answer, prompt and completion, and what the user defines.

Where a row is told from its columns it becomes a conversation, because that is how it will be asked when it is
served. Where the config names one of Axolotl's prompt formats (``type: alpaca``) it becomes that text.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from adapterhub.trainers.config import DataSource, UserFormat
from adapterhub.trainers.data.chat import PairReader, conversation
from adapterhub.trainers.data.rows import BadRow, Conversation, Text, kind, text_of


@dataclass(frozen=True)
class Columns:
    """Names of the columns of one data set."""

    instruction: str
    output: str
    input: str = "input"
    system: str = "system"

    @classmethod
    def of(cls, source: DataSource, instruction: str, output: str) -> Columns:
        return cls(
            source.field_instruction or instruction,
            source.field_output or output,
            source.field_input or "input",
            source.field_system or "system",
        )

    @property
    def names(self) -> frozenset[str]:
        return frozenset({self.instruction, self.output, self.input, self.system})

    def read(self, raw: Mapping[str, Any]) -> tuple[str, str, str, str]:
        """Instruction, input, system and output; the two in the middle may be missing. Raises BadRow."""
        return (
            text_of(raw, self.instruction),
            optional_text(raw, self.input),
            optional_text(raw, self.system),
            text_of(raw, self.output, empty=False),
        )


class InstructionReader:
    """A question and its answer as one exchange."""

    def __init__(self, source: DataSource, instruction: str, output: str) -> None:
        self.source, self.fields = source, Columns.of(source, instruction, output)
        self.columns = self.fields.names

    def __call__(self, raw: Mapping[str, Any], where: str) -> Conversation:
        instruction, given, system, output = self.fields.read(raw)
        messages = [{"role": "system", "content": system}] if system else []
        question = f"{instruction}\n\n{given}" if given else instruction
        messages += [{"role": "user", "content": question}, {"role": "assistant", "content": output}]
        return conversation(messages, {}, where, source=self.source, key=self.fields.output)


@dataclass(frozen=True)
class Style:
    """How an instruction is written as text; ``{instruction}``, ``{input}`` and ``{system}`` stand for the row's."""

    turn: str
    turn_without_input: str
    system: str
    default_system: str = ""
    default_system_without_input: str = ""


_BELOW = "Below is an instruction that describes a task"
_APPROPRIATELY = "Write a response that appropriately completes the request."

# As Stanford's Alpaca published it, and as Axolotl writes the other three.
STYLES: Mapping[str, Style] = {
    "alpaca": Style(
        turn="### Instruction:\n{instruction}\n\n### Input:\n{input}\n\n### Response:\n",
        turn_without_input="### Instruction:\n{instruction}\n\n### Response:\n",
        system="{system}\n\n",
        default_system=f"{_BELOW}, paired with an input that provides further context. {_APPROPRIATELY}",
        default_system_without_input=f"{_BELOW}. {_APPROPRIATELY}",
    ),
    "alpaca:chat": Style(
        turn="USER: {instruction}\n{input}\nASSISTANT: ",
        turn_without_input="USER: {instruction}\nASSISTANT: ",
        system="SYSTEM: {system}\n",
    ),
    "alpaca:chatml": Style(
        turn="<|im_start|>user\n{instruction}\n{input}<|im_end|>\n<|im_start|>assistant\n",
        turn_without_input="<|im_start|>user\n{instruction}<|im_end|>\n<|im_start|>assistant\n",
        system="<|im_start|>system\n{system}<|im_end|>\n",
    ),
    "alpaca:phi": Style(
        turn="<|user|>\n{instruction}\n{input}<|end|>\n<|assistant|>\n",
        turn_without_input="<|user|>\n{instruction}<|end|>\n<|assistant|>\n",
        system="<|system|>\n{system}<|end|>\n",
    ),
}


class StyledReader:
    """An instruction as text in one of the styles that Axolotl has."""

    def __init__(self, source: DataSource, style: Style) -> None:
        self.style, self.fields = style, Columns.of(source, "instruction", "output")
        self.columns = self.fields.names

    def __call__(self, raw: Mapping[str, Any], where: str) -> Text:
        instruction, given, system, output = self.fields.read(raw)
        return Text(_prompt(self.style, instruction, given, system), output, where)


class UserReader:
    """Columns and formats that the config spells out."""

    def __init__(self, source: DataSource, user: UserFormat) -> None:
        self.source = source
        self.fields = Columns(
            user.field_instruction or source.field_instruction or "instruction",
            user.field_output or source.field_output or "output",
            user.field_input or source.field_input or "input",
            user.field_system or source.field_system or "system",
        )
        self.columns, self.chat = self.fields.names, user.format is None
        without = user.no_input_format or user.format or ""
        self.style = Style(
            turn=user.format or "",
            turn_without_input=without,
            system=user.system_format,
            default_system=user.system_prompt,
            default_system_without_input=user.system_prompt,
        )
        self._as_chat = InstructionReader(source, self.fields.instruction, self.fields.output)
        self._as_chat.fields = self.fields

    def __call__(self, raw: Mapping[str, Any], where: str) -> Conversation | Text:
        if self.chat:
            return self._as_chat(raw, where)
        instruction, given, system, output = self.fields.read(raw)
        return Text(_prompt(self.style, instruction, given, system), output, where)


class PromptReader:
    """``prompt`` and ``completion``, both text or both lists of messages."""

    def __init__(self, source: DataSource) -> None:
        self._pair = PairReader(source)
        self.columns = self._pair.columns

    def __call__(self, raw: Mapping[str, Any], where: str) -> Conversation | Text:
        prompt, completion = raw.get("prompt"), raw.get("completion")
        if isinstance(prompt, list) and isinstance(completion, list):
            return self._pair(raw, where)
        for key, value in (("prompt", prompt), ("completion", completion)):
            if not isinstance(value, str):
                raise BadRow(f"{key} is {kind(value)}", "prompt and completion as text, or both as lists of messages")
        return Text(text_of(raw, "prompt"), text_of(raw, "completion", empty=False), where)


def _prompt(style: Style, instruction: str, given: str, system: str) -> str:
    system = system or (style.default_system if given else style.default_system_without_input)
    before = filled(style.system, system=system) if system else ""
    turn = style.turn if given else style.turn_without_input
    return before + filled(turn, instruction=instruction, input=given, system=system)


def filled(form: str, **values: str) -> str:
    """Only our own names are filled in: a row's text may hold braces."""
    parts = []
    while form:
        before, brace, after = form.partition("{")
        name, closing, rest = after.partition("}")
        parts.append(before)
        if not brace:
            break
        if closing and name in values:
            parts.append(values[name])
            form = rest
        else:
            parts.append(brace)
            form = after
    return "".join(parts)


def optional_text(raw: Mapping[str, Any], key: str) -> str:
    value = raw.get(key)
    if value is None:
        return ""
    if not isinstance(value, str):
        raise BadRow(f"{key} is {kind(value)}", "text, or nothing")
    return value
