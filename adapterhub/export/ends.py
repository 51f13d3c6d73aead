"""Embedding and head: where a base has one tensor for both, does an adapter leave them one? No torch.

PEFT computes with one weight for the embedding and one for the head, and an adapter may change one of them. LoRA on a
tied embedding leaves the head as it was; one merged tensor for both would be another model. So the two become two
tensors, unless nothing tells them apart: both resized alike, both with the same new tokens, both with the same factors.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import numpy.typing as npt

from adapterhub import names, peftdir
from adapterhub.base import BaseModel
from adapterhub.errors import Unsupported
from adapterhub.export.files import read_at
from adapterhub.export.layout import Delta, Tokens
from adapterhub.export.packing import Stored
from adapterhub.export.refusals import cannot
from adapterhub.peftdir import Factor, PeftDir, Tensor, pattern_value, scale_of

# PEFT ties factors where one of these is adapted, and looks for no other name when it loads an adapter.
_SEEN_BY_PEFT = ("embed_tokens", "lm_head")


@dataclass(frozen=True)
class Change:
    """What becomes of one tensor."""

    delta: Delta | None = None
    saved: Tensor | None = None  # in the adapter's file, taken in place of the base's
    tokens: Tokens | None = None  # rows that are the adapter's


@dataclass(frozen=True)
class Changes:
    """All that an adapter changes."""

    tensors: Mapping[str, Change]
    embedding: str = ""  # of it an untied head is made
    head: str = ""  # a tensor that the base does not have; empty where nothing is untied
    config: Mapping[str, Any] = field(default_factory=dict)  # keys of the new model's config


@dataclass(frozen=True)
class Saved:
    """A tensor of the adapter's that is taken as it is."""

    tensor: Tensor
    own: bool  # a module to save has a copy of its own, even where the base's is shared


@dataclass(frozen=True)
class Ends:
    """Embedding and head as the checkpoint names their tensors; empty where it has none."""

    embedding: str
    head: str  # where tied: what it would be named
    tied: bool

    @property
    def both(self) -> tuple[str, str]:
        return self.embedding, self.head


def find_ends(base: BaseModel, weights: Mapping[str, Stored]) -> Ends:
    architecture = names.architecture(base.config)
    embeddings, heads = architecture.stored(architecture.embedding), architecture.stored(architecture.head)
    at = next((i for i, name in enumerate(embeddings) if f"{name}.weight" in weights), None)
    tied = names.tied(base.config)
    if at is None:
        return Ends("", "", tied)
    head = next((f"{name}.weight" for name in heads if f"{name}.weight" in weights), "")
    if tied and not head and at < len(heads):  # a checkpoint of the bare model has no place for a head
        head = f"{heads[at]}.weight"
    return Ends(f"{embeddings[at]}.weight", head, tied)


def settle(
    tensors: Mapping[str, Change],
    saved: Mapping[str, Saved],
    ends: Ends,
    adapter: PeftDir,
    base: BaseModel,
    weights: Mapping[str, Stored],
) -> Changes:
    """One tensor or two, and how many rows they have. Raises Unsupported."""
    if not set(ends.both) & tensors.keys():
        return Changes(tensors)
    changes = _tied(tensors, saved, ends, adapter, base) if ends.tied else Changes(tensors)
    return _sized(changes, ends, base, weights)


def _tied(
    tensors: Mapping[str, Change], saved: Mapping[str, Saved], ends: Ends, adapter: PeftDir, base: BaseModel
) -> Changes:
    """They share one weight: the base's, or one that was saved because it has another size."""
    if not ends.head or ends.head in base.tensors:
        why = "the head is stored, too" if ends.head else "the checkpoint is of the bare model, without a head"
        raise Unsupported(
            f"the tied head or embedding of {base.name} cannot be changed",
            why=f"tie_word_embeddings is set, but {why}",
            hint="save the base once with AutoModelForCausalLM.save_pretrained",
        )
    deltas = {name: change.delta for name in ends.both if (change := tensors.get(name)) and change.delta}
    if adapter.config.get("ensure_weight_tying"):
        deltas = _tied_deltas(deltas, ends, adapter, base)
    wholes, tokens = _tied_wholes(saved, ends, adapter), _tied_tokens(tensors, saved, ends, adapter)
    pair = {name: Change(deltas.get(name), wholes[name], tokens[name]) for name in ends.both}
    rest = {name: change for name, change in tensors.items() if name not in pair}
    if pair[ends.embedding] == pair[ends.head]:
        return Changes(rest | {ends.embedding: pair[ends.embedding]})
    return Changes(rest | pair, ends.embedding, ends.head, {"tie_word_embeddings": False})


def _tied_deltas(deltas: dict[str, Delta], ends: Ends, adapter: PeftDir, base: BaseModel) -> dict[str, Delta]:
    """With ``ensure_weight_tying`` the head computes with the embedding's factors, and with a scale of its own."""
    if not deltas:
        return deltas
    module = names.architecture(base.config).head
    if not _ties(adapter.config):
        if ends.head in deltas:
            why = (
                f"it has factors of {module}, tied to the embedding's, that PEFT drops when it loads them: it ties only"
            )
            raise cannot(adapter, f"{why} {' and '.join(_SEEN_BY_PEFT)}")
        return deltas
    if len(deltas) < 2:
        raise cannot(adapter, "ensure_weight_tying wants factors of embedding and head, and there are those of one")
    embedding, head = deltas[ends.embedding], deltas[ends.head]
    if not _turned(embedding.factor, head.factor, adapter):
        raise cannot(adapter, "ensure_weight_tying says that embedding and head share factors, and they differ")
    rank = int(
        pattern_value(adapter.config.get("rank_pattern") or {}, module, adapter.config.get("r", head.factor.rank))
    )
    scale = scale_of(adapter.config, module, rank)
    if head.magnitude:
        return {**deltas, ends.head: replace(head, factor=replace(head.factor, scale=scale))}
    return {**deltas, ends.head: replace(embedding, factor=replace(embedding.factor, scale=scale))}


def _ties(config: Mapping[str, Any]) -> bool:
    """Whether PEFT ties the factors again when it loads the adapter."""
    targets = config.get("target_modules") or ()
    if isinstance(targets, str):
        return any(re.fullmatch(targets, name) for name in _SEEN_BY_PEFT)
    return any(target.rpartition(".")[2] in _SEEN_BY_PEFT for target in targets)


def _tied_wholes(saved: Mapping[str, Saved], ends: Ends, adapter: PeftDir) -> dict[str, Tensor | None]:
    shared = next((saved[name].tensor for name in ends.both if name in saved and not saved[name].own), None)
    wholes = {name: saved[name].tensor if name in saved and saved[name].own else shared for name in ends.both}
    one, other = wholes.values()
    if one and other and one != other and adapter.config.get("ensure_weight_tying"):
        alike = one.shape == other.shape and one.dtype == other.dtype and _bytes(adapter, one) == _bytes(adapter, other)
        return dict.fromkeys(ends.both, one) if alike else wholes
    return wholes


def _tied_tokens(
    tensors: Mapping[str, Change], saved: Mapping[str, Saved], ends: Ends, adapter: PeftDir
) -> dict[str, Tokens | None]:
    """PEFT gives the embedding's new tokens to the head, unless that has others."""
    embedding, head = (tensors[name].tokens if name in tensors else None for name in ends.both)
    if embedding and ends.head in saved and saved[ends.head].own:
        raise cannot(adapter, "its embedding has trainable tokens, which the head shares, and the head is saved whole")
    if embedding and (head is None or head.rows == embedding.rows):
        head = embedding
    return {ends.embedding: embedding, ends.head: head}


def _sized(changes: Changes, ends: Ends, base: BaseModel, weights: Mapping[str, Stored]) -> Changes:
    """Embedding and head must have as many rows; another number than the base's goes into the config."""

    def rows(name: str) -> int:
        saved = changes.tensors[name].saved if name in changes.tensors else None
        return (saved or weights[name if name in weights else ends.embedding].tensor).shape[0]

    bias = f"{ends.head.rpartition('.')[0]}.bias"
    parts = [ends.embedding, *([ends.head] if ends.head in weights or changes.head else [])]
    counts = {name: rows(name) for name in (*parts, *([bias] if bias in weights else []))}
    if len(set(counts.values())) > 1:
        raise Unsupported(
            f"the adapter's vocabulary does not fit the base {base.name}",
            why=", ".join(f"{name} has {count} rows" for name, count in counts.items()),
            hint="save the adapter with save_embedding_layers=True, embedding and head both",
        )
    count = counts[ends.embedding]
    resized = {"vocab_size": count} if count != weights[ends.embedding].tensor.shape[0] else {}
    return replace(changes, config={**changes.config, **resized})


def _turned(embedding: Factor, head: Factor, adapter: PeftDir) -> bool:
    """Whether the head's A is the embedding's B turned round, and its B the embedding's A, bit by bit."""
    pairs = ((head.a, embedding.b), (head.b, embedding.a))
    return all(
        one.dtype == other.dtype and np.array_equal(_bits(adapter, one), _bits(adapter, other).T)
        for one, other in pairs
    )


def _bits(adapter: PeftDir, tensor: Tensor) -> npt.NDArray[Any]:
    width = (tensor.end - tensor.start) // max(1, math.prod(tensor.shape))
    return np.frombuffer(_bytes(adapter, tensor), f"<u{width}").reshape(tensor.shape)


def _bytes(adapter: PeftDir, tensor: Tensor) -> bytearray:
    return read_at(adapter.path / peftdir.WEIGHTS, tensor.start, tensor.end - tensor.start)
