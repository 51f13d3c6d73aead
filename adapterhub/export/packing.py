"""What a quantised base stores in place of a weight, told from headers. No torch.

    bitsandbytes     q.weight (packed), q.weight.absmax, q.weight.quant_map, q.weight.quant_state.bitsandbytes__nf4 …
                     q.weight (int8), q.SCB, q.weight_format
    fp8              q.weight (float8), q.weight_scale_inv: one scale a block of 128 × 128, a row, or the tensor
    compressed-tensors, float-quantized
                     q.weight (float8), q.weight_scale

`stored` gives every weight with the shape that it stands for; what only describes another tensor is not among them.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from adapterhub import peftdir
from adapterhub.base import BaseModel
from adapterhub.errors import AdapterError, StorageError, Unsupported
from adapterhub.export.files import read_at
from adapterhub.peftdir import Tensor

FLOAT8 = frozenset({"F8_E4M3", "F8_E5M2"})

_STATE = ".quant_state.bitsandbytes__"
_SAFETENSORS = {"float32": "F32", "float16": "F16", "bfloat16": "BF16"}
_SCALES = ("_scale_inv", "_scale")  # after the weight's name
_ASIDE = ("input_scale", "activation_scale", "weight_format")  # says nothing of the weight's values


@dataclass(frozen=True)
class Packing:
    """How one quantised tensor is stored."""

    kind: str  # nf4, fp4, int8 or fp8
    parts: Mapping[str, tuple[Path, Tensor]] = field(default_factory=dict)  # absmax, quant_map, scale …
    dtype: str = "F32"  # to which its values are rounded when they are unpacked, as the layer itself does
    block: tuple[int, int] = (1, 64)  # elements under one scale: rows, columns; of 4 bits: in one row of all elements
    nested_block: int = 256  # scales under one scale
    nested_offset: float = 0.0


@dataclass(frozen=True)
class Stored:
    """One weight of the checkpoint."""

    file: Path
    tensor: Tensor  # with the shape that it stands for, the dtype and the bytes that are stored
    packing: Packing | None = None


def stored(base: BaseModel) -> dict[str, Stored]:
    """Name → weight, in checkpoint order.

    Raises:
        Unsupported: a quantisation that cannot be unpacked here.
        StorageError: a file is broken, or a part of a quantised tensor is missing.
    """
    method = quantisation(base.config)
    found = {name: (file, tensor) for file, tensors in _headers(base) for name, tensor in tensors}
    try:
        packings = dict(_packings(found, method, base.config))
    except KeyError as error:
        raise StorageError(
            f"the base {base.name} is incomplete", why=f"no file holds {error.args[0]}", hint="fetch the base again"
        ) from error
    parts = {tensor.name for packing, _ in packings.values() for _, tensor in packing.parts.values()}
    aside = {n for n in found if n.endswith(_ASIDE) or _STATE in n} if method else set()
    return {
        name: Stored(file, replace(tensor, shape=packings[name][1]), packings[name][0])
        if name in packings
        else Stored(file, tensor)
        for name, (file, tensor) in found.items()
        if name not in parts and name not in aside
    }


def quantisation(config: Mapping[str, Any]) -> str:
    """``bitsandbytes``, ``fp8`` …; empty where the base is not quantised."""
    found = config.get("quantization_config") or (config.get("text_config") or {}).get("quantization_config")
    if not found:
        return ""
    return str(found.get("quant_method", "unknown")) if isinstance(found, dict) else "unknown"


def check_quantisation(base: BaseModel, precision: str | None) -> None:
    """Raises Unsupported for what cannot be unpacked, and where ``--base-precision`` does not fit the base."""
    method = quantisation(base.config)
    settings = base.config.get("quantization_config") or {}
    readable = method in {"", "bitsandbytes", "fp8"}
    if not readable and not (method == "compressed-tensors" and settings.get("format") == "float-quantized"):
        raise Unsupported(
            f"the base {base.name} is quantised ({method})",
            why="only bitsandbytes (nf4, fp4, int8) and float8 weights are unpacked here",
            hint="name the original, unquantised model with --base",
        )
    if precision == "original" and method:
        raise Unsupported(
            f"the base {base.name} is quantised ({method})",
            why="--base-precision original merges into the weights before quantisation, which it does not hold",
            hint="name the original model with --base, or say --base-precision dequantized",
        )
    if precision is None and method == "bitsandbytes":
        raise Unsupported(
            f"the base {base.name} is quantised ({method})",
            why="the adapter can be merged into what the quantised weights stand for, or into the original model's;"
            " the two answer differently",
            hint="say --base-precision dequantized, or name the original model with --base",
        )
    if precision == "dequantized" and not method and not any(t.dtype in FLOAT8 for _, t in base.tensors.values()):
        raise Unsupported(
            f"the base {base.name} is not quantised",
            why="--base-precision dequantized merges into what quantised weights stand for",
            hint="leave it out, or name the quantised copy that the adapter was trained on with --base",
        )


def _headers(base: BaseModel) -> Iterator[tuple[Path, list[tuple[str, Tensor]]]]:
    try:
        for file in base.weight_files:
            yield file, [(tensor.name, tensor) for tensor in peftdir.read_header(file)]
    except AdapterError as error:
        raise StorageError(error.what, why=error.why, hint="fetch the base model again") from error


Found = Mapping[str, tuple[Path, Tensor]]


def _packings(
    found: Found, method: str, config: Mapping[str, Any]
) -> Iterator[tuple[str, tuple[Packing, tuple[int, ...]]]]:
    """Weight → how it is packed, and the shape that it stands for."""
    for name, (_, tensor) in found.items():
        if _STATE in name:
            weight = name.partition(_STATE)[0]
            yield weight, _four_bits(found, weight, name)
        elif name.endswith(".SCB"):
            weight = name.removesuffix(".SCB") + ".weight"
            # bitsandbytes multiplies by 1/127 in float32 and leaves the product there
            yield weight, (Packing("int8", {"scale": found[name]}), found[weight][1].shape)
        elif tensor.dtype in FLOAT8:
            yield name, (_float8(found, name, method, config), tensor.shape)


def _four_bits(found: Found, weight: str, state_name: str) -> tuple[Packing, tuple[int, ...]]:
    file, tensor = found[state_name]
    try:
        state = json.loads(bytes(read_at(file, tensor.start, tensor.end - tensor.start)))
        shape = tuple(int(n) for n in state["shape"])
        packing = Packing(
            kind=state["quant_type"],
            parts={part: found[f"{weight}.{part}"] for part in _four_bit_parts(state)},
            dtype=_SAFETENSORS[state["dtype"]],
            block=(1, int(state["blocksize"])),
            nested_block=int(state.get("nested_blocksize", 256)),
            nested_offset=float(state.get("nested_offset", 0.0)),
        )
    except (ValueError, TypeError, AttributeError) as error:
        raise StorageError(f"{state_name} cannot be read", why=repr(error), hint="fetch the base again") from error
    stored_bytes, told = found[weight][1].end - found[weight][1].start, math.prod(shape)
    if stored_bytes != (told + 1) // 2:
        raise StorageError(
            f"{weight} is broken",
            why=f"{stored_bytes} bytes cannot hold {told} values of 4 bits",
            hint="fetch it again",
        )
    return packing, shape


def _four_bit_parts(state: Mapping[str, Any]) -> tuple[str, ...]:
    nested = ("nested_absmax", "nested_quant_map") if "nested_blocksize" in state else ()
    return ("absmax", "quant_map", *nested)


def _float8(found: Found, name: str, method: str, config: Mapping[str, Any]) -> Packing:
    scale = next((found[name + end] for end in _SCALES if name + end in found), None)
    if scale is None:
        if method:
            raise KeyError(name + _SCALES[method != "fp8"])
        return Packing("fp8")  # a plain cast: every value is its own
    shape, (_, tensor) = found[name][1].shape, scale
    rows, columns = (*tensor.shape, 1, 1)[:2]
    if tensor.shape in {(), (1,), (1, 1)}:
        block = (max(1, shape[0]), math.prod(shape[1:]) or 1)
    elif (rows, columns) == (shape[0], 1):
        block = (1, math.prod(shape[1:]) or 1)
    else:
        settings = config.get("quantization_config") or {}
        block = tuple(settings.get("weight_block_size") or (128, 128))
        if len(shape) != 2 or tensor.shape != (-(-shape[0] // block[0]), -(-shape[1] // block[1])):
            raise Unsupported(
                f"{name} cannot be unpacked",
                why=f"{list(tensor.shape)} scales for {list(shape)} values in blocks of {list(block)}",
                hint="name an unquantised copy of the model with --base",
            )
    return Packing("fp8", {"scale": scale}, block=(block[0], block[1]))
