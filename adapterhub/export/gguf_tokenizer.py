"""``tokenizer.json`` → GGUF's vocabulary. No tokenizers, no torch: the file says it all.

Byte-level BPE, and SentencePiece BPE (`gguf_sentencepiece`). Of the former llama.cpp splits a text by rules that it
knows by name (``tokenizer.ggml.pre``): a tokenizer whose rules it does not have would be loaded and split other tokens,
so it is refused.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from adapterhub.errors import StorageError, Unsupported
from adapterhub.export import gguf_sentencepiece as sentencepiece

NORMAL, CONTROL, USER_DEFINED, UNUSED = 1, 3, 4, 5  # llama.cpp's token types

_CONTRACTIONS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_REST = r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_UPPER, _LOWER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
_SPLITS = {  # a regex of `Split` → llama.cpp's name for it
    _CONTRACTIONS + r"|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}" + _REST: "llama-bpe",
    _CONTRACTIONS + r"|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}" + _REST: "qwen2",
    rf"[^\r\n\p{{L}}\p{{N}}]?{_UPPER}*{_LOWER}+|[^\r\n\p{{L}}\p{{N}}]?{_UPPER}+{_LOWER}*|\p{{N}}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+": "tekken",
}
_WHOLE_WORDS_FIRST = frozenset({"llama-bpe", "tekken"})  # where llama.cpp ignores merges for a word that is a token
_NORMALIZERS = {"qwen2": "NFC"}  # what llama.cpp's users live without: text that comes in is NFC nearly always


@dataclass(frozen=True)
class Vocabulary:
    """What a GGUF file says of the tokenizer."""

    model: str  # gpt2: byte-level BPE; llama: SentencePiece
    pre: str  # the name of the pre-tokenizer
    tokens: tuple[str, ...]
    types: tuple[int, ...]
    merges: tuple[str, ...]
    special: Mapping[str, int]  # bos, eos, padding, unknown → id
    add_bos: bool
    add_eos: bool
    template: str | None
    scores: tuple[float, ...] = ()  # of SentencePiece, in place of merges
    space_prefix: bool = False  # whether a text gets a space before its first word
    note: str = ""  # what a person should know


def vocabulary(files: Mapping[str, Path], config: Mapping[str, Any]) -> Vocabulary:
    """``files``: the model's sidecars by name. ``config``: the model's, for its vocabulary's size and its end.

    Raises Unsupported, StorageError.
    """
    if "tokenizer.json" not in files:
        raise _refused("the model has no tokenizer.json")
    data = _read(files["tokenizer.json"])
    settings = _read(files["tokenizer_config.json"]) if "tokenizer_config.json" in files else {}
    try:
        pieces = sentencepiece.is_sentencepiece(data["model"])
        pre = _sentencepiece(data) if pieces else _pre_tokenizer(data)
        tokens, types = _tokens(data, int(config["vocab_size"]), pieces=pieces)
        first, last = _ends(data.get("post_processor"))
        ids = {token: i for i, token in enumerate(tokens)}
        return Vocabulary(
            model="llama" if pieces else "gpt2",
            pre=pre,
            tokens=tokens,
            types=types,
            merges=() if pieces else tuple(" ".join(pair) for pair in sentencepiece.merges(data["model"])),
            scores=sentencepiece.scores(data, tokens) if pieces else (),
            space_prefix=pieces and sentencepiece.space_prefix(data),
            note=sentencepiece.note(data) if pieces else "",
            special=_special(settings, config, ids),
            add_bos=first,
            add_eos=last,
            template=_template(files, settings),
        )
    except (KeyError, TypeError, AttributeError) as error:
        raise _refused(f"tokenizer.json is of an unknown form ({error!r})") from error


def _sentencepiece(data: Mapping[str, Any]) -> str:
    if why := sentencepiece.why_not(data):
        raise _refused(f"its SentencePiece model cannot be llama.cpp's: {why}")
    return "default"


def _pre_tokenizer(data: Mapping[str, Any]) -> str:
    model = data["model"]
    if model.get("type") != "BPE":
        raise _refused(f"its tokenizer is {model.get('type')}, and only BPE is converted here")
    steps = _steps(data.get("pre_tokenizer"))
    kinds = [step["type"] for step in steps]
    level = steps[-1] if kinds and kinds[-1] == "ByteLevel" else {}
    pre = ""
    if level and not level.get("add_prefix_space"):
        if kinds == ["ByteLevel"] and level.get("use_regex", True):
            pre = "gpt-2"
        elif kinds == ["Digits", "ByteLevel"] and steps[0].get("individual_digits") and level.get("use_regex", True):
            pre = "smollm"
        elif kinds == ["Split", "ByteLevel"] and not level.get("use_regex", True):
            split = steps[0]
            if split.get("behavior") == "Isolated" and not split.get("invert"):
                pre = _SPLITS.get(split["pattern"].get("Regex", ""), "")
    if not pre:
        raise _refused(f"llama.cpp has no known name for its pre-tokenizer ({', '.join(kinds) or 'none'})")
    if bool(model.get("ignore_merges")) != (pre in _WHOLE_WORDS_FIRST):
        raise _refused(f"ignore_merges is {model.get('ignore_merges')}, llama.cpp's {pre} has it the other way")
    normalizer = (data.get("normalizer") or {}).get("type")
    if normalizer not in {None, _NORMALIZERS.get(pre)}:
        raise _refused(f"it normalises text ({normalizer}), llama.cpp does not")
    return pre


def _steps(pre_tokenizer: Mapping[str, Any] | None) -> list[Mapping[str, Any]]:
    if pre_tokenizer is None:
        return []
    return list(pre_tokenizer["pretokenizers"]) if pre_tokenizer["type"] == "Sequence" else [pre_tokenizer]


def _tokens(data: Mapping[str, Any], size: int, *, pieces: bool) -> tuple[tuple[str, ...], tuple[int, ...]]:
    """Every row of the embedding has a token; those that the tokenizer does not know are unused."""
    tokens = [f"[PAD{i}]" for i in range(size)]
    types = [UNUSED] * size
    model = data["model"]
    own = {token: sentencepiece.kind(token, model) if pieces else NORMAL for token in model["vocab"]}
    entries = [(i, token, own[token]) for token, i in model["vocab"].items()]
    entries += [
        (entry["id"], entry["content"], CONTROL if entry.get("special") else USER_DEFINED)
        for entry in data.get("added_tokens", [])
        if own.get(entry["content"]) != sentencepiece.UNKNOWN
    ]
    for i, token, kind in entries:
        if i >= size:
            raise _refused(f"its tokenizer has the token {token!r} with number {i}, the model {size} tokens")
        tokens[i], types[i] = token, kind
    return tuple(tokens), tuple(types)


def _ends(post_processor: Mapping[str, Any] | None) -> tuple[bool, bool]:
    """Whether a text gets a token before it, and one behind it."""
    if post_processor is None:
        return False, False
    for step in [post_processor, *post_processor.get("processors", [])]:
        if step["type"] == "TemplateProcessing" and step["single"]:
            return "SpecialToken" in step["single"][0], "SpecialToken" in step["single"][-1]
    return False, False


def _special(settings: Mapping[str, Any], config: Mapping[str, Any], ids: Mapping[str, int]) -> dict[str, int]:
    """The tokenizer's word first: it knows where training ended its turns."""
    found: dict[str, int] = {}
    for name, key in (("bos", "bos"), ("eos", "eos"), ("padding", "pad"), ("unknown", "unk")):
        token = settings.get(f"{key}_token")
        number: Any = ids.get(token["content"] if isinstance(token, dict) else token) if token else None
        if number is None:
            told = config.get(f"{key}_token_id")
            number = told[0] if isinstance(told, list) and told else told
        if isinstance(number, int) and 0 <= number < len(ids):
            found[name] = number
    return found


def _template(files: Mapping[str, Path], settings: Mapping[str, Any]) -> str | None:
    if "chat_template.jinja" in files:
        return files["chat_template.jinja"].read_text(encoding="utf-8")
    told = settings.get("chat_template")
    if isinstance(told, list):
        return next((str(entry["template"]) for entry in told if entry["name"] == "default"), None)
    return str(told) if told else None


def _refused(why: str) -> Unsupported:
    return Unsupported(
        "the tokenizer cannot be written as GGUF", why=why, hint="leave out --format, and convert the merged model"
    )


def _read(path: Path) -> dict[str, Any]:
    try:
        data: dict[str, Any] = json.loads(path.read_bytes())
    except (OSError, ValueError) as error:
        raise StorageError(f"{path} cannot be read", why=str(error), hint="fetch the base model again") from error
    return data
