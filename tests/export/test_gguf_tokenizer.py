"""Tokenizers in GGUF: llama.cpp's own code splits texts into the tokens of `tokenizers`, for every kind we write."""

from __future__ import annotations

import inspect
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

from adapterhub.errors import Unsupported
from adapterhub.export import gguf_sentencepiece as sentencepiece
from adapterhub.export.gguf_tokenizer import vocabulary

# As Mistral publishes it; test_published_patterns compares the others with their makers' own.
TEKKEN = (
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+"
    r"|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*|\p{N}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
CORPUS = [
    "The capital of France is Paris, and the capital of Germany is Berlin; they're 1054 kilometres apart.",
    "def main(argv):\n    return sum(int(word) for word in argv if word.isdigit())\n\n\nclass Thing:\n\tpass\n",
    "Où est la bibliothèque ? Ça n'est pas loin d'ici. Der Zug fährt um 17:45 Uhr, sagte sie.",
]
TEXTS = [
    "Hello world",
    "  two spaces,   three   and a tab\there  ",
    "numbers 1 12 123 1234 12345 3.14159 and 1,000,000",
    "they're HERE'S we'Ve i'll I'D don't",
    "été naïve Straße ΑΒΓ привет 日本語 한국어 🎉👩‍👩‍👧 \u00a0\u200b",
    "line\nline\r\n\r\n  indented\n\n\n\tend\n ",
    "f(x)=>{return !x;} // http://example.com/a?b=c&d=%20#e",
    "MixedCase HTMLParser snake_case __init__ ÉCOLE",
    "...!!! --- *** ((nested)) [brackets] {braces} <tags/>",
    "the capital of France is Paris " * 3,
]


def byte_level(steps: list[Any], **settings: Any) -> Tokenizer:
    tokenizer = Tokenizer(models.BPE(**settings))
    tokenizer.pre_tokenizer = steps[0] if len(steps) == 1 else pre_tokenizers.Sequence(steps)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    tokenizer.train_from_iterator(CORPUS * 4, trainers.BpeTrainer(vocab_size=400, initial_alphabet=alphabet))
    tokenizer.add_special_tokens([AddedToken("<|end|>", special=True)])
    return tokenizer


def split(pattern: str) -> list[Any]:
    return [
        pre_tokenizers.Split(Regex(pattern), "isolated"),
        pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
    ]


def pieces(scheme: str = "legacy") -> Tokenizer:
    """SentencePiece's kind: bytes, characters, and merges that begin with a word's space."""
    trained = Tokenizer(models.BPE())
    trained.pre_tokenizer = pre_tokenizers.Metaspace()
    trained.train_from_iterator(CORPUS * 4, trainers.BpeTrainer(vocab_size=300))
    model = json.loads(trained.to_str())["model"]
    first = ["<unk>", "<s>", "</s>", *(f"<0x{n:02X}>" for n in range(256))]
    vocabulary = {token: i for i, token in enumerate([*first, *model["vocab"]])}
    merges = [tuple(pair) for pair in model["merges"]]
    settings: dict[str, Any] = {"unk_token": "<unk>", "fuse_unk": True, "byte_fallback": True}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=merges, **settings))
    if scheme == "legacy":
        tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    elif scheme == "none":
        tokenizer.normalizer = normalizers.Replace(" ", "▁")
    else:
        tokenizer.pre_tokenizer = pre_tokenizers.Metaspace("▁", prepend_scheme=scheme, split=False)
    tokenizer.add_special_tokens([AddedToken(token, special=True) for token in first[:3]])
    return tokenizer


def patterns() -> dict[str, str]:
    from transformers.convert_slow_tokenizer import TikTokenConverter
    from transformers.models.qwen2.tokenization_qwen2 import PRETOKENIZE_REGEX

    llama = inspect.signature(TikTokenConverter.__init__).parameters["pattern"].default
    return {"llama-bpe": llama, "qwen2": PRETOKENIZE_REGEX, "tekken": TEKKEN}


def make(kind: str) -> Tokenizer:
    if kind.startswith("llama-2"):
        return pieces(kind.removeprefix("llama-2-"))
    whole = {"ignore_merges": True} if kind in {"llama-bpe", "tekken"} else {}
    if kind in patterns():
        return byte_level(split(patterns()[kind]), **whole)
    level = pre_tokenizers.ByteLevel(add_prefix_space=False)
    return byte_level([pre_tokenizers.Digits(individual_digits=True), level] if kind == "smollm" else [level])


KINDS = ("gpt-2", "smollm", "llama-bpe", "qwen2", "tekken", "llama-2-legacy", "llama-2-always", "llama-2-none")


def write(tokenizer: Tokenizer, folder: Path) -> dict[str, Path]:
    folder.mkdir(exist_ok=True)
    tokenizer.save(str(folder / "tokenizer.json"))
    return {"tokenizer.json": folder / "tokenizer.json"}


@pytest.mark.parametrize("kind", KINDS)
def test_kinds_are_told_by_their_rules(kind: str, tmp_path: Path) -> None:
    tokenizer = make(kind)
    size = tokenizer.get_vocab_size()
    words = vocabulary(write(tokenizer, tmp_path), {"vocab_size": size + 3})
    assert list(words.tokens[:size]) == [tokenizer.id_to_token(i) for i in range(size)]
    assert list(words.types[size:]) == [5, 5, 5]
    if kind.startswith("llama-2"):
        assert (words.model, words.space_prefix) == ("llama", kind != "llama-2-none")
        assert list(words.types[:4]) == [2, 3, 3, 6]
        assert len(words.scores) == size + 3
    else:
        assert (words.model, words.pre) == ("gpt2", kind)


def test_published_patterns() -> None:
    published = pytest.importorskip("mistral_common")
    files = (Path(published.__file__).parent / "data").glob("tekken_*.json")
    assert {json.loads(file.read_text())["config"]["pattern"] for file in files} == {TEKKEN}


def test_scores_are_in_the_order_of_the_merges() -> None:
    data = json.loads(pieces().to_str())
    merged = ["".join(pair) for pair in sentencepiece.merges(data["model"])]
    found = sentencepiece.scores(data, [*merged, "<s>"])
    assert list(found[:-1]) == sorted(found[:-1], reverse=True)
    assert found[-1] < min(found[:-1])


def test_mistral_has_the_same_order(tmp_path: Path) -> None:
    """What SentencePiece's own file says of the tokens of Mistral 7B."""
    published, own = pytest.importorskip("mistral_common"), pytest.importorskip("sentencepiece")
    from transformers.convert_slow_tokenizer import generate_merges

    model = own.SentencePieceProcessor(str(Path(published.__file__).parent / "data" / "tokenizer.model.v1"))
    tokens = [model.id_to_piece(i) for i in range(len(model))]
    theirs = {token: model.get_score(i) for i, token in enumerate(tokens)}
    merges = generate_merges({token: i for i, token in enumerate(tokens)}, theirs)
    data = {"model": {"merges": [list(pair) for pair in merges], "vocab": {}}}
    ours = dict(zip(tokens, sentencepiece.scores(data, tokens), strict=True))
    made = sorted({"".join(pair) for pair in merges}, key=lambda token: -theirs[token])
    assert len(made) > 25_000
    told = [ours[token] for token in made if theirs[token] > -1e9]
    assert told == sorted(told, reverse=True)


def test_where_spaces_differ_is_told(tmp_path: Path) -> None:
    notes = {}
    for scheme in ("legacy", "always", "first", "none"):
        tokenizer = pieces(scheme)
        words = vocabulary(write(tokenizer, tmp_path), {"vocab_size": tokenizer.get_vocab_size()})
        notes[scheme] = words.note
    assert (notes["legacy"], notes["none"]) == ("", "")
    assert "begins with one;" in notes["always"]
    assert "special token" in notes["first"]


def test_sentencepiece_that_llama_cpp_would_read_differently(tmp_path: Path) -> None:
    def why(**changes: Any) -> str:
        data = json.loads(pieces().to_str())
        model = data["model"] | changes.pop("model", {})
        (tmp_path / "tokenizer.json").write_text(json.dumps(data | changes | {"model": model}))
        with pytest.raises(Unsupported) as caught:
            vocabulary({"tokenizer.json": tmp_path / "tokenizer.json"}, {"vocab_size": 1000})
        return str(caught.value.why)

    assert "normalises" in why(normalizer={"type": "Lowercase"})
    assert "normalises" in why(pre_tokenizer={"type": "Metaspace", "replacement": "▁", "split": True})
    assert "ignore_merges" in why(model={"ignore_merges": True})
    vocab = {token: i for token, i in json.loads(pieces().to_str())["model"]["vocab"].items() if token != "<0x41>"}
    assert "byte 65" in why(model={"vocab": vocab})
    assert "order" in why(model={"merges": [["a", "bc"], ["b", "c"], ["ab", "c"]]})


LLAMA_CPP = """
import json, sys, urllib.request
import xllamacpp
texts = json.loads(sys.argv[1])
for file in sys.argv[2:]:
    params = xllamacpp.CommonParams()
    params.model.path, params.n_ctx, params.warmup = file, 256, False
    server = xllamacpp.Server(params)
    for text in texts:
        body = json.dumps({"content": text, "add_special": False}).encode()
        kind = {"content-type": "application/json"}
        request = urllib.request.Request(server.listening_address + "/tokenize", body, kind)
        print("tokens:" + urllib.request.urlopen(request, timeout=60).read().decode(), flush=True)
"""


@pytest.mark.slow
def test_llama_cpp_splits_the_same_tokens(tiny_base: Path, adapter_writer: Any, ah: Any, tmp_path: Path) -> None:
    pytest.importorskip("xllamacpp")
    import torch
    from safetensors.torch import save_file

    from tests.conftest import llama_shapes

    adapter = adapter_writer(tmp_path / "adapter", base=tiny_base)
    for kind in KINDS:
        tokenizer, base = make(kind), tmp_path / kind
        write(tokenizer, base)
        config = json.loads((tiny_base / "config.json").read_text()) | {"vocab_size": tokenizer.get_vocab_size()}
        (base / "config.json").write_text(json.dumps(config | dict.fromkeys(("eos_token_id", "pad_token_id"), 2)))
        tensors = {name: torch.randn(shape) for name, shape in llama_shapes(config).items()}
        save_file(tensors, base / "model.safetensors", metadata={"format": "pt"})
        to = tmp_path / f"{kind}.gguf"
        ran = ah("export", adapter, "--base", base, "--to", to, "--format", "gguf", "--gguf-type", "f32")
        assert ran.code == 0, ran.err
    files = [str(tmp_path / f"{kind}.gguf") for kind in KINDS]
    command = [sys.executable, "-c", LLAMA_CPP, json.dumps(TEXTS), *files]
    ran = subprocess.run(command, check=True, capture_output=True, text=True, timeout=300)
    lines = [line.removeprefix("tokens:") for line in ran.stdout.splitlines() if line.startswith("tokens:")]
    found = [json.loads(line)["tokens"] for line in lines]
    wanted = [(kind, text, make(kind).encode(text, add_special_tokens=False).ids) for kind in KINDS for text in TEXTS]
    assert len(found) == len(wanted)
    for (kind, text, ids), tokens in zip(wanted, found, strict=True):
        told = kind == "llama-2-always" and text.startswith(" ")  # the note says that these differ
        assert (tokens == ids) != told, (kind, text)
