"""Base + adapter → one GGUF file for llama.cpp, or the adapter alone as GGUF LoRA.

    result = export_gguf(Path("runs/support/adapter"), find_base("Qwen/Qwen3-0.6B"), Path("support.gguf"), kind="q8_0")

The plan is that of every export. A tensor at a time is merged in float32, put in llama.cpp's order and rounded once to
the file's type; norms, biases and rows that q8_0 cannot divide stay wider. The file has its name when it is whole and
durable. A LoRA file says one alpha for all, and llama.cpp multiplies by alpha / rank: what is right for each module
(rsLoRA, alpha patterns) goes into its B (docs/decisions/0036).
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from adapterhub import peftdir
from adapterhub.base import BaseModel
from adapterhub.errors import AlreadyExists, StorageError, Unsupported, UsageError
from adapterhub.export import arithmetic
from adapterhub.export.files import sync
from adapterhub.export.gguf_names import (
    Q8_BLOCK,
    TYPES,
    Architecture,
    Array,
    architecture,
    hyperparameters,
    rope_factors,
)
from adapterhub.export.gguf_tokenizer import Vocabulary, vocabulary
from adapterhub.export.layout import BLOCK, Delta, Operation, Rows
from adapterhub.export.plan import Plan, plan_export
from adapterhub.export.sidecars import choose
from adapterhub.manifest import BaseFingerprint, Record

LORA_TYPES = ("f32", "f16", "bf16")

Values = Callable[[], Array]  # float32, made when it is written


@dataclass(frozen=True)
class GgufResult:
    """A GGUF file that is durable under its name."""

    path: Path
    kind: str  # f32, f16, bf16, q8_0
    tensors: int
    bytes_written: int
    seconds: float
    note: str = ""  # of the plan, and of the tokenizer

    def to_json(self) -> dict[str, Any]:
        return {
            "path": str(self.path),
            "type": self.kind,
            "tensors": self.tensors,
            "bytes_written": self.bytes_written,
            "seconds": round(self.seconds, 3),
            "note": self.note,
        }


def export_gguf(
    adapter: Path,
    base: BaseModel,
    to: Path,
    *,
    kind: str = "f16",
    lora: bool = False,
    base_precision: str | None = None,
    recorded: BaseFingerprint | None = None,
    record: Record | None = None,
    progress: Callable[[int], None] | None = None,
) -> GgufResult:
    """Write the new file ``to``: base + adapter, or with ``lora`` the adapter alone.

    ``kind`` is f32, f16, bf16 or, for a model, q8_0. ``base_precision``, ``recorded``: as `plan_export`. ``record``
    goes into the metadata. ``progress`` is called with bytes written. Memory: the largest tensor in float32, twice.

    Raises:
        Unsupported: an architecture, a tokenizer or an adapter that cannot be written as GGUF.
        AdapterError, BaseMismatch, AlreadyExists, StorageError, UsageError, MissingDependency: as `plan_export`.
    """
    started = time.perf_counter()
    if kind not in (LORA_TYPES if lora else TYPES):
        raise UsageError(
            f"{kind!a} is no type of a {'GGUF LoRA' if lora else 'GGUF model'}",
            hint=f"choose one of {', '.join(LORA_TYPES if lora else TYPES)}",
        )
    if to.suffix != ".gguf":
        raise UsageError(f"{to} is not named as a GGUF file", hint=f"--to {to.name or 'model'}.gguf")
    arch = architecture(base.config)
    recorded = recorded or (record.manifest.base if record else None)
    plan = plan_export(adapter, base, to.absolute(), base_precision=base_precision, recorded=recorded)
    if "vocab_size" in plan.config:
        raise Unsupported(
            f"{adapter} cannot be written as GGUF",
            why=f"it was trained with a vocabulary of {plan.config['vocab_size']} tokens, another than the base's",
            hint="export the model to a folder, and convert that with llama.cpp's convert_hf_to_gguf.py",
        )
    arch = architecture({**base.config, **plan.config})  # the head may be no longer the embedding
    words = None if lora else vocabulary(choose(base.path, adapter), base.config)
    if lora:
        _check_lora(plan)
    tensors = _lora_tensors(plan, arch) if lora else _model_tensors(plan, arch)
    _check_disk(plan, sum(tensor.size(kind) for tensor in tensors))
    import gguf

    writer = gguf.GGUFWriter(None, arch.name)
    _describe(writer, plan, arch, lora=lora, kind=kind, record=record)
    if words is not None:
        _add_vocabulary(writer, words)
    with _new_file(plan.to) as hidden, arithmetic.one_thread_a_block():
        _write(writer, hidden, tensors, kind, progress)
        size = hidden.stat().st_size
    note = "; ".join(filter(None, (plan.note, words.note if words else "")))
    return GgufResult(plan.to, kind, len(tensors), size, time.perf_counter() - started, note)


# ── tensors ──────────────────────────────────────────────────────────────────────────────────────────────────


@dataclass(frozen=True)
class GgufTensor:
    """A tensor of the new file; its values are made when it is its turn."""

    name: str
    shape: tuple[int, ...]
    values: Values

    def type(self, kind: str) -> str:
        """What it is stored as: llama.cpp wants vectors in float32, and whole blocks of q8_0 in a row."""
        if len(self.shape) < 2:
            return "f32"
        return "f16" if kind == "q8_0" and self.shape[-1] % Q8_BLOCK else kind

    def size(self, kind: str) -> int:
        """Bytes in the file."""
        import gguf

        block, width = gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType[self.type(kind).upper()]]
        return math.prod(self.shape) // int(block) * int(width)


def _model_tensors(plan: Plan, arch: Architecture) -> list[GgufTensor]:
    found = []
    factors = rope_factors(arch)
    if factors is not None:
        found.append(GgufTensor("rope_freqs.weight", factors.shape, lambda: factors))
    for operation in plan.operations:
        name = arch.tensor(operation.source.name)
        if name is not None:
            found.append(GgufTensor(name, operation.source.shape, _merged(plan, operation, arch, name)))
    return found


def _merged(plan: Plan, operation: Operation, arch: Architecture, name: str) -> Values:
    weights = plan.adapter.path / peftdir.WEIGHTS

    def values() -> Array:
        wide = replace(operation, dtype="F32")  # rounded once, to the file's type, and not to the base's before
        delta = arithmetic.product(operation, operation.delta, weights) if operation.delta else None
        whole = len(operation.source.shape) == 2
        count, columns = operation.source.shape if whole else (operation.elements, 1)
        result = np.empty((count, columns), "<f4")
        step = max(1, BLOCK // columns)
        for first in range(0, count, step):
            rows = Rows(wide, first, min(first + step, count), columns)
            result[rows.first : rows.last] = np.frombuffer(arithmetic.rewrite(rows, delta), "<f4").reshape(-1, columns)
        return arch.stored(name, result.reshape(operation.source.shape))

    return values


def _lora_tensors(plan: Plan, arch: Architecture) -> list[GgufTensor]:
    alpha = _alpha(plan)
    found = []
    for operation in plan.merged:
        name = arch.tensor(operation.source.name)
        if operation.delta and name is not None:
            a, b = _factors(plan, operation.delta, arch, name, alpha)
            found += [a, b]
    return found


def _factors(plan: Plan, delta: Delta, arch: Architecture, name: str, alpha: float) -> tuple[GgufTensor, GgufTensor]:
    """A (rank, in) as it is; B (out, rank) with what alpha / rank lacks of the true scale, its rows as the weight's."""
    factor, weights = delta.factor, plan.adapter.path / peftdir.WEIGHTS
    rest = np.float32(factor.scale * factor.rank / alpha)

    def a() -> Array:
        values: Array = arithmetic.read_float32(factor.a, weights).numpy()
        return values

    def b() -> Array:
        values: Array = arithmetic.read_float32(factor.b, weights).numpy()
        return arch.reorder(name, values * rest)

    return GgufTensor(f"{name}.lora_a", factor.a.shape, a), GgufTensor(f"{name}.lora_b", factor.b.shape, b)


def _check_lora(plan: Plan) -> None:
    verdict = peftdir.verdicts(plan.adapter).gguf
    why = verdict.reason if verdict.answer == "no" else ""
    if plan.adapter.others:
        why = f"{plan.adapter.others[0].name} is no LoRA factor, and a GGUF LoRA holds nothing else"
    if plan.config.get("tie_word_embeddings") is False:
        why = "head and embedding are one in the base, and two with it"
    if why:
        raise Unsupported(
            f"{plan.adapter.path} cannot be written as GGUF LoRA", why=why, hint="--format gguf writes the merged model"
        )


def _alpha(plan: Plan) -> float:
    """The largest rank: modules of that rank then have the scale 1, as llama.cpp computes it."""
    return float(max(factor.rank for factor in plan.adapter.factors))


# ── the file ─────────────────────────────────────────────────────────────────────────────────────────────────


def _check_disk(plan: Plan, size: int) -> None:
    if plan.free < size:
        raise StorageError(
            f"not enough disk for {plan.to}",
            why=f"it takes {size / 1e9:.1f} GB, {plan.free / 1e9:.1f} GB are free",
            hint="make room, name a file on another disk with --to, or take a smaller --gguf-type",
        )


def _describe(writer: Any, plan: Plan, arch: Architecture, *, lora: bool, kind: str, record: Record | None) -> None:
    import gguf

    writer.add_type("adapter" if lora else "model")
    writer.add_name(str(record.ref) if record else plan.adapter.path.name)
    writer.add_file_type(gguf.LlamaFileType[{"f32": "ALL_F32"}.get(kind, f"MOSTLY_{kind.upper()}")])
    writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
    if lora:
        writer.add_string(gguf.Keys.Adapter.TYPE, "lora")
        writer.add_float32(gguf.Keys.Adapter.LORA_ALPHA, _alpha(plan))
    else:
        for key, value in hyperparameters(arch).items():
            add = {int: writer.add_uint32, float: writer.add_float32, str: writer.add_string}[type(value)]
            add(f"{arch.name}.{key}", value)
    writer.add_string("adapterhub.base.name", plan.base.name)
    writer.add_string("adapterhub.base.content", plan.base.fingerprint.content)
    if record:
        writer.add_string("adapterhub.adapter.digest", record.digest)


def _add_vocabulary(writer: Any, words: Vocabulary) -> None:
    writer.add_tokenizer_model(words.model)
    writer.add_tokenizer_pre(words.pre)
    writer.add_token_list(words.tokens)
    writer.add_token_types(words.types)
    if words.scores:
        writer.add_token_scores(words.scores)
        writer.add_add_space_prefix(words.space_prefix)
    else:
        writer.add_token_merges(words.merges)
    add: Mapping[str, Callable[[int], None]] = {
        "bos": writer.add_bos_token_id,
        "eos": writer.add_eos_token_id,
        "padding": writer.add_pad_token_id,
        "unknown": writer.add_unk_token_id,
    }
    for name, number in words.special.items():
        add[name](number)
    writer.add_add_bos_token(words.add_bos)
    writer.add_add_eos_token(words.add_eos)
    if words.template is not None:
        writer.add_chat_template(words.template)


def _write(
    writer: Any, path: Path, tensors: list[GgufTensor], kind: str, progress: Callable[[int], None] | None
) -> None:
    import gguf

    for tensor in tensors:
        stored = gguf.GGMLQuantizationType[tensor.type(kind).upper()]
        writer.add_tensor_info(tensor.name, tensor.shape, np.dtype(np.float32), tensor.size(kind), raw_dtype=stored)
    try:
        writer.write_header_to_file(path)
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        for tensor in tensors:
            data = _as_type(tensor, tensor.type(kind))
            writer.write_tensor_data(data)
            if progress:
                progress(data.nbytes)
    finally:
        writer.close()


def _as_type(tensor: GgufTensor, kind: str) -> Array:
    import gguf

    values = np.ascontiguousarray(tensor.values())
    if kind == "f16" and bool(np.abs(values).max(initial=0) > 65504):
        raise UsageError(
            f"{tensor.name} does not fit f16",
            why=f"it holds {float(np.abs(values).max()):.3g}, float16 ends at 65504",
            hint="--gguf-type bf16 or f32",
        )
    data: Array = gguf.quantize(values, gguf.GGMLQuantizationType[kind.upper()])
    return data


@contextmanager
def _new_file(to: Path) -> Iterator[Path]:
    """A hidden file beside ``to`` that gets its name when it is whole and durable, and is gone on an error."""
    hidden = to.with_name(f".{to.name}.exporting")
    try:
        to.parent.mkdir(parents=True, exist_ok=True)
        try:
            yield hidden
            sync(hidden)
            _name(hidden, to)
            sync(to.parent)
        finally:
            hidden.unlink(missing_ok=True)
    except OSError as error:
        raise StorageError(
            f"the export to {to} broke off, and nothing of it is left",
            why=error.strerror or str(error),
            hint="make room or name another file with --to",
        ) from error


def _name(hidden: Path, to: Path) -> None:
    if to.exists():
        raise AlreadyExists(f"{to} exists", why="it was made while this export ran")
    hidden.rename(to)
