"""What an adapter changes in a checkpoint, tensor by tensor, or the reason why it does not fit. No torch.

    factors          W + s·B·A; with a magnitude, DoRA; with a bias of their own, the layer's bias too
    saved tensors    modules to save, biases, embeddings of another size: the adapter's in place of the base's
    head, embedding  where they are one tensor and the adapter changes one of them, they become two

The last is what PEFT computes with: LoRA on a tied embedding leaves the head as it was. One merged tensor for both
would be another model.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from adapterhub.base import BaseModel
from adapterhub.errors import BaseMismatch, Unsupported
from adapterhub.export import names
from adapterhub.export.layout import DTYPES, WIDTH, Delta
from adapterhub.export.packing import Stored
from adapterhub.peftdir import Factor, PeftDir, Tensor

_PREFIX = "base_model.model."
_ORIGINAL = ".original_module."  # what PEFT keeps beside a module to save; it is the base's
_COPY = re.compile(r"\.modules_to_save(\.default)?\.")  # the module to save itself; saved without this, too


@dataclass(frozen=True)
class Change:
    """What becomes of one tensor."""

    delta: Delta | None = None
    saved: Tensor | None = None  # in the adapter's file, taken in place of the base's


@dataclass(frozen=True)
class Changes:
    """All that an adapter changes."""

    tensors: Mapping[str, Change]
    embedding: str = ""  # of it an untied head is made
    head: str = ""  # a tensor that the base does not have; empty where nothing is untied
    config: Mapping[str, Any] = field(default_factory=dict)  # keys of the new model's config


@dataclass(frozen=True)
class _Saved:
    tensor: Tensor
    own: bool  # a module to save has a copy of its own, even where the base's is shared


@dataclass(frozen=True)
class _Ends:
    """Embedding and head as the checkpoint names their tensors; empty where it has none."""

    embedding: str
    head: str  # where tied: what it would be named
    tied: bool


def find_changes(adapter: PeftDir, base: BaseModel, weights: Mapping[str, Stored]) -> Changes:
    """Match every tensor of the adapter with one of the base. Raises BaseMismatch, Unsupported."""
    ends = _ends(base, weights)
    saved = _saved(adapter, base, weights, ends)
    deltas = _deltas(adapter, base, weights, ends, saved)
    tensors = {
        name: Change(deltas.get(name), saved[name].tensor if name in saved else None)
        for name in sorted(deltas.keys() | saved.keys())
    }
    touched = {ends.embedding, ends.head} & tensors.keys()
    changes = _tied(adapter, tensors, saved, ends, base, weights) if ends.tied and touched else Changes(tensors)
    return _sized(changes, ends, base, weights) if touched else changes


# ── matching ─────────────────────────────────────────────────────────────────────────────────────────────────


def _ends(base: BaseModel, weights: Mapping[str, Stored]) -> _Ends:
    architecture = names.architecture(base.config)
    embeddings, heads = architecture.stored(architecture.embedding), architecture.stored(architecture.head)
    at = next((i for i, name in enumerate(embeddings) if f"{name}.weight" in weights), None)
    tied = names.tied(base.config)
    if at is None:
        return _Ends("", "", tied)
    head = next((f"{name}.weight" for name in heads if f"{name}.weight" in weights), "")
    if tied and not head and at < len(heads):  # a checkpoint of the bare model has no place for a head
        head = f"{heads[at]}.weight"
    return _Ends(f"{embeddings[at]}.weight", head, tied)


def _find(module: str, parameter: str, base: BaseModel, weights: Mapping[str, Stored], ends: _Ends) -> str:
    """The tensor of a module in the checkpoint; of a tied head its name, which the checkpoint lacks."""
    architecture = names.architecture(base.config)
    if module == architecture.head and parameter == "weight" and ends.tied and ends.head:
        return ends.head
    for name in architecture.stored(module):
        if f"{name}.{parameter}" in weights:
            return f"{name}.{parameter}"
    raise BaseMismatch(
        f"the adapter does not match the base {base.name}",
        why=f"the base has no {parameter} for {module}",
        hint="name the base that it was trained on with --base",
    )


def _saved(adapter: PeftDir, base: BaseModel, weights: Mapping[str, Stored], ends: _Ends) -> dict[str, _Saved]:
    """Name in the checkpoint → the adapter's tensor."""
    modules_to_save = tuple(adapter.config.get("modules_to_save") or ())
    adapted = {factor.module for factor in adapter.factors}
    found: dict[str, _Saved] = {}
    for tensor in adapter.others:
        plain = _COPY.sub(".", tensor.name)
        if _ORIGINAL in tensor.name or (plain != tensor.name and plain in adapter.tensors):
            continue
        module, _, parameter = plain.removeprefix(_PREFIX).replace(".base_layer.", ".").rpartition(".")
        if module in adapted and ".base_layer." not in tensor.name:
            raise _cannot(adapter, f"{module} is both saved whole and adapted")
        name = _find(module, parameter, base, weights, ends)
        if name in found:
            raise _cannot(adapter, f"{tensor.name} and {found[name].tensor.name} would both be {name}")
        shape = weights[name if name in weights else ends.embedding].tensor.shape
        resized = name in {ends.embedding, ends.head} or f"{name.rpartition('.')[0]}.weight" == ends.head
        if tensor.shape != shape and not (resized and tensor.shape[1:] == shape[1:]):
            raise _mismatch(base, module, shape, tensor.shape)
        found[name] = _Saved(tensor, any(module.endswith(saved) for saved in modules_to_save))
    return found


def _deltas(
    adapter: PeftDir,
    base: BaseModel,
    weights: Mapping[str, Stored],
    ends: _Ends,
    saved: Mapping[str, _Saved],
) -> dict[str, Delta]:
    deltas: dict[str, Delta] = {}
    for factor in adapter.factors:
        name = _find(factor.module, "weight", base, weights, ends)
        if name in deltas:
            raise BaseMismatch(
                f"{adapter.path} does not match the base {base.name}",
                why=f"{deltas[name].factor.module} and {factor.module} would both change {name}",
            )
        weight = weights[name if name in weights else ends.embedding]
        shape = saved[name].tensor.shape if name in saved else weight.tensor.shape
        deltas[name] = _delta(factor, weight, shape, base, adapter)
        if factor.bias is not None:
            bias = _find(factor.module, "bias", base, weights, ends)
            deltas[bias] = Delta(factor, bias=True)
    return deltas


def _delta(factor: Factor, stored: Stored, shape: tuple[int, ...], base: BaseModel, adapter: PeftDir) -> Delta:
    """``shape`` is the weight's, which may be a saved one of another size."""
    made = (factor.b.shape[0], factor.a.shape[1])
    if len(factor.a.shape) != 2 or len(factor.b.shape) != 2:
        raise _cannot(adapter, f"{factor.module} is no linear layer")
    transposed = factor.embedding or (names.architecture(base.config).conv1d and shape == made[::-1])
    if factor.module == names.architecture(base.config).head:
        transposed = False  # GPT-2's is a plain linear layer
    if shape != (made[::-1] if transposed else made):
        raise _mismatch(base, factor.module, shape, made[::-1] if factor.embedding else made)
    if stored.tensor.dtype not in WIDTH and not stored.packing:
        raise Unsupported(
            f"the base {base.name} cannot be merged into",
            why=f"{stored.tensor.name} is stored as {stored.tensor.dtype}",
            hint=f"name a copy of it in {', '.join(DTYPES)} with --base",
        )
    return Delta(factor, transposed)


# ── head and embedding ───────────────────────────────────────────────────────────────────────────────────────


def _tied(
    adapter: PeftDir,
    tensors: Mapping[str, Change],
    saved: Mapping[str, _Saved],
    ends: _Ends,
    base: BaseModel,
    weights: Mapping[str, Stored],
) -> Changes:
    """They share one weight: the base's, or one that was saved because it has another size. A module to save has a copy
    of its own, and factors are on one of the two."""
    if not ends.head or ends.head in weights:
        why = "the head is stored, too" if ends.head else "the checkpoint is of the bare model, without a head"
        raise Unsupported(
            f"the tied head or embedding of {base.name} cannot be changed",
            why=f"tie_word_embeddings is set, but {why}",
            hint="save the base once with AutoModelForCausalLM.save_pretrained",
        )
    both = (ends.embedding, ends.head)
    shared = next((saved[n].tensor for n in both if n in saved and not saved[n].own), None)
    if adapter.config.get("ensure_weight_tying") and any(n in tensors and tensors[n].delta for n in both):
        raise _cannot(adapter, "ensure_weight_tying shares the factors of embedding and head, and not all models alike")
    pair = {}
    for name in both:
        own = saved[name].tensor if name in saved and saved[name].own else None
        pair[name] = Change(tensors[name].delta if name in tensors else None, own or shared)
    rest = {name: change for name, change in tensors.items() if name not in pair}
    if pair[ends.embedding] == pair[ends.head]:  # both as they were, or resized
        return Changes(rest | {ends.embedding: pair[ends.embedding]})
    return Changes(rest | pair, ends.embedding, ends.head, {"tie_word_embeddings": False})


def _sized(changes: Changes, ends: _Ends, base: BaseModel, weights: Mapping[str, Stored]) -> Changes:
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
    return Changes(changes.tensors, changes.embedding, changes.head, {**changes.config, **resized})


def _cannot(adapter: PeftDir, why: str) -> Unsupported:
    return Unsupported(f"{adapter.path} cannot be merged", why=why, hint="serve it as an adapter, or merge with PEFT")


def _mismatch(base: BaseModel, module: str, shape: tuple[int, ...], made: tuple[int, ...]) -> BaseMismatch:
    return BaseMismatch(
        f"the adapter does not match the base {base.name}",
        why=f"{module} is {list(shape)} there, the adapter makes {list(made)}",
        hint="name the base that it was trained on with --base",
    )
