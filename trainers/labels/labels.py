"""Which tokens are trained on: the assistant's turns and their ends, found from the chat template itself.

No list of known templates. For every assistant turn the template is asked three things:

    where it starts   the prompt that serving would send: the messages before it, rendered with the generation prompt
    where its text    two renderings that differ in this turn's text only: what follows the difference is the turn's
        ends          tail ("<|im_end|>\\n", " </s>", …)
    where it ends     the first end-of-sequence token in the tail, else its last special token

What the model sees is one rendering of the whole conversation, as serving would send it. A template that writes
no end token gets the tokenizer's, after the last turn: without it the model would never learn to stop.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from adapterhub.errors import ConfigError, DataError
from adapterhub.trainers.data import Conversation, Row, Segments, Text, Tokens
from adapterhub.trainers.labels.examples import IGNORED, Example
from adapterhub.trainers.labels.marked import Marked, examples_of

# They differ in their first and last characters, so that nothing of them counts as common text.
_SENTINELS = ("a7 sentinel 7a", "b8 sentinel 8b")


@dataclass(frozen=True)
class _Turn:
    """Where a turn stands in the text: what the model writes, and the token that ends it."""

    start: int
    text_end: int
    end: int


class _Refused(Exception):
    """What a template raised: on purpose, or because it met what it does not know."""


class Labeler:
    """Turns rows into token ids and labels with one tokenizer and one template."""

    def __init__(
        self,
        tokenizer: Any,
        *,
        template: str | None,
        train_on_inputs: bool = False,
        end_ids: Sequence[int] = (),
        eot_tokens: Sequence[str] = (),
    ) -> None:
        """``end_ids``: tokens that end a generation, besides the tokenizer's own; ``eot_tokens``: these alone do.

        Raises ConfigError: the tokenizer gives no offsets, or the template ends a turn with none of ``eot_tokens``.
        """
        if not getattr(tokenizer, "is_fast", False):
            raise ConfigError(
                "the base's tokenizer gives no character offsets",
                why="without them a turn cannot be found in the tokens; a tokenizer.json is needed",
                hint="save the base with a fast tokenizer",
            )
        self.tokenizer, self.template, self.train_on_inputs = tokenizer, template, train_on_inputs
        self._specials = frozenset(tokenizer.added_tokens_encoder)
        ends = (*end_ids, tokenizer.eos_token_id)
        self._ends = frozenset(eot_tokens or tokenizer.convert_ids_to_tokens([i for i in ends if i is not None]))
        self._tails: dict[str, str] = {}  # role → tail of a turn of text: the same for all, so it is found once
        if template and eot_tokens and (end := self.end_of_turn()) not in eot_tokens:
            raise ConfigError(
                f"eot_tokens: the chat template ends a turn with {end or 'no token'}, not with {eot_tokens[0]}",
                why="where a turn ends is found in the template",
                hint="take eot_tokens out, or name the token that the template writes",
            )

    def end_of_turn(self) -> str | None:
        """The token that ends a turn of the assistant; None where the template writes none, or refuses to say."""
        messages = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": ""}]
        try:
            tail = _common_suffix(*self._pair(messages, 1, (), "content"))
        except _Refused:
            return None
        at, after = self._closing(tail)
        return tail[at:after] or None

    def label(self, row: Row, *, max_length: int | None = None) -> Example:
        """Token ids and labels of one row, cut at ``max_length`` tokens. Raises as `label_all`."""
        return next(self.label_all((row,), max_length=max_length))

    def label_all(self, rows: Iterable[Row], *, max_length: int | None = None) -> Iterator[Example]:
        """Token ids and labels of each row, cut at ``max_length`` tokens.

        Raises:
            DataError: the template refuses a row, or leaves out its tools or tool calls; nothing of it is trained on.
        """
        for _, example in self._whole(rows):
            yield example.cut(max_length)

    def examples(self, rows: Iterable[Row], *, max_length: int) -> Iterator[Example]:
        """As `label_all`, but running text that is longer becomes several rows of about the same length."""
        for row, example in self._whole(rows):
            if isinstance(row, Text) and row.splits:
                yield from example.parts(max_length)
            else:
                yield example.cut(max_length)

    def _whole(self, rows: Iterable[Row]) -> Iterator[tuple[Row, Example]]:
        """Up to the last trained token: what follows it changes no loss."""
        for row, example in examples_of(((row, self._marked(row)) for row in rows), self.tokenizer):
            if not example.trained:
                raise DataError(f"{row.where}: no token of this row is trained on", hint="see ah train --show-labels 3")
            yield row, example

    def _marked(self, row: Row) -> Marked | Example:
        if isinstance(row, Tokens):
            return self._tokens(row)
        if isinstance(row, Conversation):
            text, spans = self._conversation(row)
        elif isinstance(row, Segments):
            text, spans = _joined(row)
        else:
            text, spans = self._text(row)
        if self.train_on_inputs and not isinstance(row, Segments):  # segments say themselves what is trained on
            spans = [(0, len(text))]
        return Marked(text, tuple(spans), row.where, special_tokens=isinstance(row, Text))

    def _tokens(self, row: Tokens) -> Example:
        if max(row.input_ids) >= len(self.tokenizer):
            raise DataError(
                f"{row.where}: input_ids holds {max(row.input_ids)}",
                why=f"the base's tokenizer has {len(self.tokenizer)} tokens: the ids are another tokenizer's",
                hint="make the ids with the tokenizer of base_model",
            )
        return Example(list(row.input_ids), list(row.labels), row.where, len(row.input_ids)).to_last_trained()

    def prompt(self, messages: Sequence[Mapping[str, Any]], tools: Sequence[Mapping[str, Any]] = ()) -> str:
        """The text that serving would send for these messages."""
        return self._render(messages, tools, generate=True)

    # ── text without a template ──

    def _text(self, row: Text) -> tuple[str, list[tuple[int, int]]]:
        end = self.tokenizer.eos_token or ""
        completion = row.completion if row.completion.endswith(end) else row.completion + end
        return row.prompt + completion, [(len(row.prompt), len(row.prompt) + len(completion))]

    # ── conversations ──

    def _conversation(self, row: Conversation) -> tuple[str, list[tuple[int, int]]]:
        if self.template is None:
            raise DataError(
                f"{row.where}: chat data needs a chat template",
                why="the base's tokenizer has none",
                hint="set chat_template: chatml, or jinja with chat_template_jinja; or train an instruct model",
            )
        try:
            full = self._render(row.messages, row.tools)
            if row.tools and full == self._render(row.messages, ()):
                raise DataError(
                    f"{row.where}: the chat template does not write tools",
                    why="they would be left out of the prompt without a word",
                    hint="write them into the system message, or use a template that takes tools",
                )
            turns: dict[int, _Turn] = {}  # by the message's place
            closed, trained = True, row.trained_places
            for i, message in enumerate(row.messages):
                if message["role"] == "assistant" or i in trained or row.ends == "all":
                    start = self._start(row, i, full, turns[max(turns)].end if turns else 0)
                    turns[i], closed = self._end(row, i, full, start)
        except _Refused as error:
            raise DataError(
                f"{row.where}: the chat template refuses this conversation",
                why=str(error),
                hint="check the order of the roles and what the template expects",
            ) from error
        last = max(turns)
        if not closed and row.messages[last]["role"] == "assistant":
            full = full[: turns[last].end].rstrip()
            turns[last] = _Turn(turns[last].start, len(full), len(full) + len(self.tokenizer.eos_token or ""))
            full += self.tokenizer.eos_token or ""
        return full, _spans(turns, row)

    def _start(self, row: Conversation, i: int, full: str, previous: int) -> int:
        """Where the model takes over; of other roles, where their text begins. ``previous``: the end before."""
        own = row.messages[i]["role"] == "assistant"
        try:
            prompt = self.prompt(row.messages[:i], row.tools) if own else ""
        except _Refused:  # many templates refuse an empty or a cut conversation; then the text itself tells
            prompt = ""
        if prompt and full.startswith(prompt) and len(prompt) >= previous:
            return len(prompt)
        # The template writes these messages otherwise when more follow (tools, dropped thoughts).
        a, b = self._pair(row.messages, i, row.tools, "content")
        if a == b:  # the template leaves the content out where there are tool calls
            a, b = self._pair(row.messages, i, row.tools, "tool_calls")
        before = min(_common_prefix(a, b), _common_prefix(a, full))
        header = self._header() if own else ""
        at = full.rfind(header, previous, before) if header else -1
        return at + len(header) if at >= 0 else before

    def _end(self, row: Conversation, i: int, full: str, start: int) -> tuple[_Turn, bool]:
        """Where the turn ends, and whether with a token that ends it."""
        through = full if i == len(row.messages) - 1 else self._render(row.messages[: i + 1], row.tools)
        tail = self._tail_of(row, i, through)
        if full.startswith(through):
            text_end = len(through) - len(tail)
        else:
            a, b = self._pair(row.messages, i, row.tools, self._last_text(row, i))
            text_end = len(full) - len(_common_suffix(a, b))
            tail = tail[: _common_prefix(full[text_end:], tail)]
        at, after = self._closing(tail)
        if after:
            return _Turn(start, max(start, text_end + at), text_end + after), True
        end = max(start, text_end + len(tail.rstrip()))
        return _Turn(start, end, end), False

    def _tail_of(self, row: Conversation, i: int, through: str) -> str:
        if self._last_text(row, i) == "content":
            role = row.messages[i]["role"]
            if role not in self._tails or not through.endswith(self._tails[role]):
                a, b = self._pair(row.messages[: i + 1], i, row.tools, "content")
                self._tails[role] = _common_suffix(a, b)
            return self._tails[role]
        a, b = self._pair(row.messages[: i + 1], i, row.tools, "tool_calls")
        if a == b:
            raise DataError(
                f"{row.where}: the chat template does not write tool calls",
                why=f"messages[{i}] has tool_calls, and they would be left out without a word",
                hint="write the calls into the content, or use a template that takes tool_calls",
            )
        return _common_suffix(a, b)

    def _closing(self, tail: str) -> tuple[int, int]:
        """Where in the tail its end-of-sequence token stands, else its last special token; (0, 0) where none does."""
        found = [(tail.find(token), token) for token in self._ends if token in tail]
        if found:
            at, token = min(found)
            return at, at + len(token)
        return max(
            ((tail.rfind(t), tail.rfind(t) + len(t)) for t in self._specials if t in tail),
            key=lambda place: place[1],
            default=(0, 0),
        )

    def _pair(
        self, messages: Sequence[Mapping[str, Any]], i: int, tools: Sequence[Mapping[str, Any]], part: str
    ) -> tuple[str, str]:
        """Two renderings that differ in one text of message ``i`` only."""
        first, second = (
            self._render([*messages[:i], _with_text(messages[i], part, s), *messages[i + 1 :]], tools)
            for s in _SENTINELS
        )
        return first, second

    @staticmethod
    def _last_text(row: Conversation, i: int) -> str:
        return "tool_calls" if row.messages[i].get("tool_calls") else "content"

    def _header(self) -> str:
        """What the template writes before an assistant turn, where it has a generation prompt."""
        probe = [{"role": "user", "content": _SENTINELS[0]}]
        bare, prompt = self._render(probe, ()), self._render(probe, (), generate=True)
        return prompt[len(bare) :] if prompt.startswith(bare) else ""

    def _render(
        self, messages: Sequence[Mapping[str, Any]], tools: Sequence[Mapping[str, Any]], *, generate: bool = False
    ) -> str:
        import jinja2

        try:
            rendered: str = self.tokenizer.apply_chat_template(
                [dict(m) for m in messages],
                tools=[dict(t) for t in tools] or None,
                chat_template=self.template,
                add_generation_prompt=generate,
                tokenize=False,
            )
        except (jinja2.TemplateError, TypeError, ValueError, KeyError, AttributeError, IndexError) as error:
            raise _Refused(f"{type(error).__name__}: {error}") from error
        return rendered


def coloured(example: Example, tokenizer: Any) -> list[tuple[str, bool]]:
    """The row's text in pieces, each with whether it is trained on; special tokens are shown as text."""
    pieces: list[tuple[list[int], bool]] = []
    for token, label in zip(example.input_ids, example.labels, strict=True):
        if not pieces or pieces[-1][1] != (label != IGNORED):
            pieces.append(([], label != IGNORED))
        pieces[-1][0].append(token)
    return [(tokenizer.decode(ids, skip_special_tokens=False), trained) for ids, trained in pieces]


def _spans(turns: Mapping[int, _Turn], row: Conversation) -> list[tuple[int, int]]:
    """What is trained on: the text of the turns that the row names, and the end tokens that it asks for."""
    trained, last = set(row.trained_places), max(turns)
    spans = []
    for place, turn in turns.items():
        ends = {"turn": place in trained, "all": True, "last": place == last, "none": False}[row.ends]
        span = turn.start if place in trained else turn.text_end, turn.end if ends else turn.text_end
        if span[0] < span[1]:
            spans.append(span)
    return spans


def _joined(row: Segments) -> tuple[str, list[tuple[int, int]]]:
    text, spans = "", []
    for piece, trained in row.pieces:
        if trained and piece:
            spans.append((len(text), len(text) + len(piece)))
        text += piece
    return text, spans


def _with_text(message: Mapping[str, Any], part: str, text: str) -> dict[str, Any]:
    """A copy with another text: the content, or the last argument (else the name) of the last call."""
    if part == "content":
        return {**message, "content": text}
    copy: dict[str, Any] = json.loads(json.dumps(message))
    function = copy["tool_calls"][-1]["function"]
    if function["arguments"]:
        function["arguments"][list(function["arguments"])[-1]] = text
    else:
        function["name"] = text
    return copy


def _common_prefix(a: str, b: str) -> int:
    """How many characters two texts start with in common; halving, because comparing slices is fast."""
    low, high = 0, min(len(a), len(b))
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if a[:middle] == b[:middle] else (low, middle - 1)
    return low


def _common_suffix(a: str, b: str) -> str:
    return a[len(a) - _common_prefix(a[::-1], b[::-1]) :]
