"""What an adapter changes in a checkpoint, tensor by tensor, or the reason why it does not fit. No torch.

    factors          W + s·B·A; with a magnitude, DoRA; with a bias of their own, the layer's bias too
    saved tensors    modules to save, biases, embeddings of another size: the adapter's in place of the base's
    tokens           some rows of embedding or head: the adapter's in place of the base's

Fused experts have a file of their own (`experts`), and so has what becomes of a tied head (`ends`).
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from adapterhub import names
from adapterhub.base import BaseModel
from adapterhub.errors import BaseMismatch, Unsupported
from adapterhub.export.ends import Change, Changes, Ends, Saved, find_ends, settle
from adapterhub.export.experts import find_experts
from adapterhub.export.layout import DTYPES, WIDTH, Delta, Tokens
from adapterhub.export.packing import Stored
from adapterhub.export.refusals import cannot, lacks, mismatch
from adapterhub.peftdir import WEIGHTS, Factor, PeftDir, is_parameter

_PREFIX = "base_model.model."
_ORIGINAL = ".original_module."  # what PEFT keeps beside a module to save; it is the base's
_TOKENS = ".token_adapter.trainable_tokens_delta"
_COPY = re.compile(r"\.modules_to_save(\.default)?\.")  # the module to save itself; saved without this, too


def find_changes(adapter: PeftDir, base: BaseModel, weights: Mapping[str, Stored]) -> Changes:
    """Match every tensor of the adapter with one of the base. Raises BaseMismatch, Unsupported."""
    ends = find_ends(base, weights)
    saved = _saved(adapter, base, weights, ends)
    tokens = _tokens(adapter, base, weights, ends, saved)
    deltas = _deltas(adapter, base, weights, ends, saved)
    tensors = {
        name: Change(deltas.get(name), saved[name].tensor if name in saved else None, tokens.get(name))
        for name in sorted(deltas.keys() | saved.keys() | tokens.keys())
    }
    return settle(tensors, saved, ends, adapter, base, weights)


def _find(module: str, parameter: str, base: BaseModel, weights: Mapping[str, Stored], ends: Ends) -> str:
    """The tensor of a module in the checkpoint; of a tied head its name, which the checkpoint lacks."""
    architecture = names.architecture(base.config)
    if module == architecture.head and parameter == "weight" and ends.tied and ends.head:
        return ends.head
    for name in architecture.stored(module):
        if f"{name}.{parameter}" in weights:
            return f"{name}.{parameter}"
    raise lacks(base, module, parameter)


def _saved(adapter: PeftDir, base: BaseModel, weights: Mapping[str, Stored], ends: Ends) -> dict[str, Saved]:
    """Name in the checkpoint → the adapter's tensor."""
    modules_to_save = tuple(adapter.config.get("modules_to_save") or ())
    adapted = {factor.module for factor in adapter.factors}
    found: dict[str, Saved] = {}
    for tensor in adapter.others:
        plain = _COPY.sub(".", tensor.name)
        if (
            tensor.name.endswith(_TOKENS)
            or _ORIGINAL in tensor.name
            or (plain != tensor.name and plain in adapter.tensors)
        ):
            continue
        module, _, parameter = (
            plain.removeprefix(_PREFIX).replace(".token_adapter.", ".").replace(".base_layer.", ".").rpartition(".")
        )
        if module in adapted and ".base_layer." not in tensor.name:
            raise cannot(adapter, f"{module} is both saved whole and adapted")
        name = _find(module, parameter, base, weights, ends)
        if name in found:
            raise cannot(adapter, f"{tensor.name} and {found[name].tensor.name} would both be {name}")
        shape = weights[name if name in weights else ends.embedding].tensor.shape
        resized = name in {ends.embedding, ends.head} or f"{name.rpartition('.')[0]}.weight" == ends.head
        if tensor.shape != shape and not (resized and tensor.shape[1:] == shape[1:]):
            raise mismatch(base, module, shape, tensor.shape)
        found[name] = Saved(tensor, any(module.endswith(saved) for saved in modules_to_save))
    return found


def _deltas(
    adapter: PeftDir,
    base: BaseModel,
    weights: Mapping[str, Stored],
    ends: Ends,
    saved: Mapping[str, Saved],
) -> dict[str, Delta]:
    deltas: dict[str, Delta] = {}
    for factor in adapter.factors:
        found = find_experts(factor, adapter, base, weights)
        if found is None:
            name = _find(factor.module, "weight", base, weights, ends)
            weight = weights[name if name in weights else ends.embedding]
            shape = saved[name].tensor.shape if name in saved else weight.tensor.shape
            found = {name: _delta(factor, shape, base, adapter)}
        if factor.bias is not None:
            found[_find(factor.module, "bias", base, weights, ends)] = Delta(factor, bias=True)
        for name, delta in found.items():
            if name in deltas:
                raise BaseMismatch(
                    f"{adapter.path} does not match the base {base.name}",
                    why=f"{deltas[name].factor.module} and {delta.factor.module} would both change {name}",
                )
            _check_stored(weights[name if name in weights else ends.embedding], base)
        deltas |= found
    return deltas


def _delta(factor: Factor, shape: tuple[int, ...], base: BaseModel, adapter: PeftDir) -> Delta:
    """``shape`` is the weight's, which may be a saved one of another size."""
    made = (factor.b.shape[0], factor.a.shape[1])
    if len(factor.a.shape) != 2 or len(factor.b.shape) != 2:
        raise cannot(adapter, f"{factor.module} is no linear layer")
    architecture = names.architecture(base.config)
    transposed = factor.embedding or (architecture.conv1d and shape == made[::-1])
    if factor.module == architecture.head or is_parameter(adapter.config, f"{factor.module}.weight"):
        transposed = False  # GPT-2's head is a plain linear layer; a parameter is taken as it lies
    if shape != (made[::-1] if transposed else made):
        raise mismatch(base, factor.module, shape, made[::-1] if factor.embedding else made)
    return Delta(factor, transposed)


def _check_stored(stored: Stored, base: BaseModel) -> None:
    if stored.tensor.dtype not in WIDTH and not stored.packing:
        raise Unsupported(
            f"the base {base.name} cannot be merged into",
            why=f"{stored.tensor.name} is stored as {stored.tensor.dtype}",
            hint=f"name a copy of it in {', '.join(DTYPES)} with --base",
        )


def _tokens(
    adapter: PeftDir, base: BaseModel, weights: Mapping[str, Stored], ends: Ends, saved: Mapping[str, Saved]
) -> dict[str, Tokens]:
    """Name in the checkpoint → its rows that are the adapter's."""
    asked = adapter.config.get("trainable_token_indices") or ()
    values = {t.name.removesuffix(_TOKENS).removeprefix(_PREFIX): t for t in adapter.others if t.name.endswith(_TOKENS)}
    if bool(asked) != bool(values):
        raise cannot(adapter, "trainable_token_indices and the file do not agree on whether there are trainable tokens")
    found = {}
    for module, tensor in values.items():
        name = _find(module, "weight", base, weights, ends)
        if name not in ends.both:
            raise cannot(adapter, f"{module} has trainable tokens, and is neither embedding nor head")
        weight = weights[name if name in weights else ends.embedding]
        shape = saved[name].tensor.shape if name in saved else weight.tensor.shape
        rows = _token_rows(asked, module)
        if tensor.shape != (len(rows), *shape[1:]):
            raise cannot(
                adapter, f"{tensor.name} is {list(tensor.shape)}, and {len(rows)} tokens of {module} are named"
            )
        if len(set(rows)) < len(rows) or not all(0 <= row < shape[0] for row in rows):
            raise cannot(adapter, f"trainable_token_indices names a token twice, or one that {module} does not have")
        if f"{name.rpartition('.')[0]}.bias" in weights:
            raise cannot(adapter, f"{module} has a bias, which PEFT leaves out where there are trainable tokens")
        _check_stored(weight, base)
        found[name] = Tokens(rows, tensor, adapter.path / WEIGHTS)
    return found


def _token_rows(asked: Any, module: str) -> tuple[int, ...]:
    """Of a list, which means the embedding, or of PEFT's dictionary: a name's end → tokens."""
    if isinstance(asked, Mapping):
        asked = next((rows for name, rows in asked.items() if f".{module}".endswith(f".{name}")), ())
    return tuple(map(int, asked))
