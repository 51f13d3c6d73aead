"""Rows without roles: running text, text in pieces, and token ids that somebody else made."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from adapterhub.trainers.config import DataSource
from adapterhub.trainers.data.rows import BadRow, Segments, Text, Tokens, kind, quoted, text_of

IGNORED = -100  # the label of a token that is not trained on


class TextReader:
    """One column of text, trained on whole; what is longer than a row may be becomes several."""

    def __init__(self, source: DataSource) -> None:
        self.key = source.field or "text"
        self.columns = frozenset({self.key})

    def __call__(self, raw: Mapping[str, Any], where: str) -> Text:
        return Text("", text_of(raw, self.key, empty=False), where, splits=True)


class SegmentsReader:
    """``{"segments": [{"label": true, "text": "…"}, …]}``: nothing is added."""

    columns = frozenset({"segments"})

    def __init__(self, source: DataSource) -> None:
        pass

    def __call__(self, raw: Mapping[str, Any], where: str) -> Segments:
        segments = raw.get("segments")
        if not isinstance(segments, list) or not segments:
            raise BadRow(
                f"segments is {'empty' if segments == [] else kind(segments)}", 'a list of {"label": true, "text": "…"}'
            )
        pieces = tuple(_piece(raw, f"segments[{i}]") for i, raw in enumerate(segments))
        if not any(label and text for text, label in pieces):
            raise BadRow("segments has no text with label true", "at least one: it is what is trained on")
        return Segments(pieces, where)


class TokensReader:
    """``input_ids``, with ``labels`` or not; without them all is trained on."""

    columns = frozenset({"input_ids", "labels", "attention_mask", "token_type_ids", "position_ids", "length"})

    def __init__(self, source: DataSource) -> None:
        pass

    def __call__(self, raw: Mapping[str, Any], where: str) -> Tokens:
        ids = _ids(raw, "input_ids")
        if min(ids) < 0:
            raise BadRow(f"input_ids holds {min(ids)}", "token ids from 0")
        labels = ids if raw.get("labels") is None else _ids(raw, "labels")
        mask = raw.get("attention_mask")
        for name, other in (("labels", labels), ("attention_mask", mask if mask is not None else ids)):
            if len(other) != len(ids):
                raise BadRow(f"{name} has {len(other)} values, input_ids {len(ids)}", "one for each token")
        wrong = next((y for x, y in zip(ids, labels, strict=True) if y not in (x, IGNORED)), None)
        if wrong is not None:
            raise BadRow(f"labels holds {wrong} where input_ids does not", f"each token's id, or {IGNORED}")
        if all(label == IGNORED for label in labels[1:]):
            raise BadRow("no token of labels is trained on", f"at least one that is not {IGNORED}, after the first")
        if mask is not None and not all(mask):
            kept = [i for i, on in enumerate(mask) if on]
            ids, labels = tuple(ids[i] for i in kept), tuple(labels[i] for i in kept)
        return Tokens(ids, labels, where)


def _piece(raw: Any, at: str) -> tuple[str, bool]:
    if not isinstance(raw, dict):
        raise BadRow(f"{at} is {kind(raw)}", 'an object like {"label": true, "text": "…"}')
    label = raw.get("label")
    if not isinstance(label, bool):
        raise BadRow(f"{at}.label is {'missing' if label is None else quoted(label)}", "true or false")
    if not isinstance(raw.get("text"), str):
        raise BadRow(f"{at}.text is {kind(raw.get('text'))}", "text")
    return raw["text"], label


def _ids(raw: Mapping[str, Any], key: str) -> tuple[int, ...]:
    values = raw.get(key)
    if not isinstance(values, list) or not values:
        raise BadRow(f"{key} is {'empty' if values == [] else kind(values)}", "a list of token ids")
    wrong = next((v for v in values if type(v) is not int), None)
    if wrong is not None:
        raise BadRow(f"{key} holds {quoted(wrong)}", "whole numbers")
    return tuple(values)
