"""SentencePiece BPE, as Llama 2 and Mistral 7B have it: ``tokenizer.json`` → llama.cpp's ``llama`` vocabulary.

llama.cpp joins the two neighbours whose sum has the highest score; `tokenizers` those whose merge stands first. The two
agree where all merges that make one token stand together, and the token's score is minus their place. The scores of
``tokenizer.model`` say the same in other numbers, but training leaves that file behind.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from itertools import groupby
from typing import Any

NORMAL, UNKNOWN, BYTE = 1, 2, 6  # llama.cpp's token types
_BYTE = re.compile(r"<0x[0-9A-F]{2}>")
_SPACE = "▁"
_NEVER = -1e9  # the score of what no merge makes
_SPLIT = {"type": "Split", "pattern": {"String": " "}, "behavior": "MergedWithPrevious", "invert": False}
_REPLACED = {"type": "Replace", "pattern": {"String": " "}, "content": _SPACE}


def is_sentencepiece(model: Mapping[str, Any]) -> bool:
    return model.get("type") == "BPE" and bool(model.get("byte_fallback"))


def why_not(data: Mapping[str, Any]) -> str:
    """Why llama.cpp would split other tokens; empty where it would not."""
    model = data["model"]
    if missing := [n for n in range(256) if f"<0x{n:02X}>" not in model["vocab"]]:
        return f"it has no token for the byte {missing[0]}"
    if model.get("ignore_merges"):
        return "ignore_merges is set, llama.cpp has it the other way"
    if _space(data) is None:
        return "it normalises text as no SentencePiece model that llama.cpp knows"
    products = [product for product, _ in groupby("".join(pair) for pair in merges(model))]
    if len(products) != len(set(products)):
        return "its merges are in another order than scores of tokens can tell"
    return ""


def space_prefix(data: Mapping[str, Any]) -> bool:
    """Whether a text gets a space before its first word."""
    return _space(data) in {"always", "first"}


def note(data: Mapping[str, Any]) -> str:
    """What a person should know: Metaspace puts no space where one is; llama.cpp does, as the older normaliser did."""
    if data.get("pre_tokenizer") is None or not space_prefix(data):
        return ""
    behind = " or follows a special token" if _space(data) == "first" else ""
    return f"llama.cpp puts a space before text also where it begins with one{behind}; this tokenizer does not"


def scores(data: Mapping[str, Any], tokens: Sequence[str]) -> tuple[float, ...]:
    """One for each token, in their order."""
    ranks: dict[str, int] = {}
    for rank, pair in enumerate(merges(data["model"])):
        ranks.setdefault("".join(pair), rank)
    return tuple(-float(ranks[token]) if token in ranks else _NEVER for token in tokens)


def kind(token: str, model: Mapping[str, Any]) -> int:
    """The type of a token that is not an added one."""
    if _BYTE.fullmatch(token):
        return BYTE
    return UNKNOWN if token == (model.get("unk_token") or "<unk>") else NORMAL


def merges(model: Mapping[str, Any]) -> list[tuple[str, str]]:
    """Older files have one string a merge, newer ones a list of two."""
    pairs = (entry.split(" ") if isinstance(entry, str) else entry for entry in model["merges"])
    return [(left, right) for left, right in pairs]


def _space(data: Mapping[str, Any]) -> str | None:
    """Where a space is put before text: ``always`` (behind each special token, too), ``first`` or ``never``."""
    normalizer, before = data.get("normalizer"), data.get("pre_tokenizer")
    if before == _SPLIT and normalizer == _REPLACED:  # Gemma's: no space is left to split at
        return "never"
    if before is not None:
        split = before.get("split", True) or before.get("type") != "Metaspace" or before.get("replacement") != _SPACE
        return None if split or normalizer is not None else str(before.get("prepend_scheme", "always"))
    steps = (normalizer or {}).get("normalizers", [normalizer])
    if steps == [{"type": "Prepend", "prepend": _SPACE}, _REPLACED]:
        return "always"
    return "never" if steps == [_REPLACED] else None
