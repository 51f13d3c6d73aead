"""A base and a fully tuned copy of it: are they the same model, and in which tensors do they differ?"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from adapterhub.base import BaseModel
from adapterhub.errors import BaseMismatch, Unsupported
from adapterhub.export.files import read_at
from adapterhub.export.layout import WIDTH
from adapterhub.export.packing import quantisation
from adapterhub.peftdir import Tensor

# Whose checkpoints name a linear layer's weight as PEFT and the engine name the layer, and keep it as (out, in).
FAMILIES = frozenset(
    {"llama", "mistral", "qwen2", "qwen3", "gemma", "gemma2", "gemma3_text", "phi3", "smollm3", "granite", "olmo2"}
)

_HEAD = "lm_head.weight"
_EMBEDDING = "model.embed_tokens.weight"
# What a config says about the computation and no tensor's shape shows.
_COMPUTATION = (
    "num_attention_heads",
    "num_key_value_heads",
    "head_dim",
    "hidden_act",
    "rms_norm_eps",
    "sliding_window",
    "attention_multiplier",
    "residual_multiplier",
    "embedding_multiplier",
    "logits_scaling",
    "query_pre_attn_scalar",
)


@dataclass(frozen=True)
class Pair:
    """One tensor in both models."""

    name: str
    before: tuple[Path, Tensor]
    after: tuple[Path, Tensor]

    @property
    def linear(self) -> bool:
        """Whether LoRA can hold its change: the weight of a linear layer that is neither embedding nor head."""
        return self.name.endswith("_proj.weight") and len(self.before[1].shape) == 2

    @property
    def size(self) -> int:
        """Bytes that are read to compare the two."""
        return sum(tensor.end - tensor.start for _, tensor in (self.before, self.after))

    def same(self) -> bool:
        """Byte for byte."""
        (old_file, old), (new_file, new) = self.before, self.after
        if old.dtype != new.dtype:
            return False
        step = 2**24
        return all(
            read_at(old_file, old.start + at, min(step, old.end - old.start - at))
            == read_at(new_file, new.start + at, min(step, old.end - old.start - at))
            for at in range(0, old.end - old.start, step)
        )


def pairs(base: BaseModel, tuned: BaseModel) -> list[Pair]:
    """Every tensor of both, in name order, from headers alone.

    Raises:
        Unsupported: an architecture or a dtype that is not known here; a vocabulary that was resized.
        BaseMismatch: two different models.
    """
    _check_configs(base, tuned)
    before, after = _without_tied_head(base), _without_tied_head(tuned)
    for name in sorted(before.keys() ^ after.keys()):
        holder, other = (base, tuned) if name in before else (tuned, base)
        raise _mismatch(base, tuned, f"{name} is in {holder.name} and not in {other.name}")
    for name, (_, tensor) in before.items():
        _check_tensor(base, tuned, tensor, after[name][1])
    return [Pair(name, entry, after[name]) for name, entry in before.items()]


def rope(config: Mapping[str, Any]) -> dict[str, Any]:
    """The rotary settings, whether the config is of transformers 4 (two keys) or 5 (one)."""
    settings = dict(config.get("rope_parameters") or config.get("rope_scaling") or {})
    kind = settings.pop("type", "default")
    return {"rope_theta": float(config.get("rope_theta") or 10000.0), "rope_type": kind} | settings


def _check_configs(base: BaseModel, tuned: BaseModel) -> None:
    kind = base.config.get("model_type")
    if tuned.config.get("model_type") != kind:
        raise _mismatch(base, tuned, f"one is {kind}, the other {tuned.config.get('model_type')}")
    if kind not in FAMILIES:
        raise Unsupported(
            f"nothing can be extracted from {kind} models yet",
            why="the names of its layers are not known here",
            hint=f"the families are {', '.join(sorted(FAMILIES))}",
        )
    for model in (base, tuned):
        if quantisation(model.config):
            raise Unsupported(
                f"{model.name} is quantised ({quantisation(model.config)})",
                why="the difference would be mostly what quantising lost",
                hint="name the unquantised model",
            )
    for key in _COMPUTATION:
        if base.config.get(key) != tuned.config.get(key) and None not in (base.config.get(key), tuned.config.get(key)):
            raise _mismatch(base, tuned, f"{key} is {base.config[key]} in one and {tuned.config[key]} in the other")
    if json.dumps(rope(base.config), sort_keys=True) != json.dumps(rope(tuned.config), sort_keys=True):
        raise _mismatch(base, tuned, f"rotary settings are {rope(base.config)} and {rope(tuned.config)}")


def _check_tensor(base: BaseModel, tuned: BaseModel, old: Tensor, new: Tensor) -> None:
    if old.shape != new.shape and old.name in {_EMBEDDING, _HEAD}:
        raise Unsupported(
            f"{tuned.name} has another vocabulary than {base.name}",
            why=f"{old.name} has {new.shape[0]} rows, the base's {old.shape[0]}; a LoRA adapter adds no tokens",
            hint="name the base with the same resized vocabulary, if there is one",
        )
    if old.shape != new.shape:
        raise _mismatch(base, tuned, f"{old.name} is {list(old.shape)} in one and {list(new.shape)} in the other")
    for model, tensor in ((base, old), (tuned, new)):
        if tensor.dtype not in WIDTH:
            raise Unsupported(f"{model.name} cannot be compared", why=f"{tensor.name} is stored as {tensor.dtype}")


def _without_tied_head(model: BaseModel) -> dict[str, tuple[Path, Tensor]]:
    """Some save a tied head beside the embedding that it is, some do not."""
    tied = model.config.get("tie_word_embeddings")
    return {name: entry for name, entry in model.tensors.items() if not (tied and name == _HEAD)}


def _mismatch(base: BaseModel, tuned: BaseModel, why: str) -> BaseMismatch:
    return BaseMismatch(
        f"{tuned.name} was not tuned from {base.name}",
        why=why,
        hint="name the model that it was tuned from with --base",
    )
