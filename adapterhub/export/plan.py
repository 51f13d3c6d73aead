"""The plan of an export: from headers alone, everything that will be done, or the reason why it cannot be.

Nothing is written and no weight is read here. What a plan accepts can still fail for three reasons only: the disk,
a NaN among the factors, or a file that changes under us.
"""

from __future__ import annotations

import math
import os
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from adapterhub import peftdir
from adapterhub.base import BaseModel
from adapterhub.errors import AlreadyExists, MissingDependency, StorageError, Unsupported, UsageError
from adapterhub.export.changes import find_changes
from adapterhub.export.ends import Change, Changes
from adapterhub.export.layout import BLOCK, DTYPES, WIDTH, FilePlan, Operation, lay_out, spread
from adapterhub.export.packing import Stored, check_quantisation, stored
from adapterhub.export.parallel import workers
from adapterhub.export.quantisable import choose_scheme, ignored, is_linear
from adapterhub.export.schemes import Scheme
from adapterhub.export.staging import left_behind
from adapterhub.manifest import BaseFingerprint
from adapterhub.names import architecture
from adapterhub.peftdir import Factor, PeftDir

PRECISIONS = ("original", "dequantized")

_SIDECARS = 64 * 2**20  # bytes allowed for tokenizer, configs and journal
_LIBRARIES = 160 * 2**20  # bytes, measured with the certificate


@dataclass(frozen=True)
class Plan:
    """Base + adapter → the files of a standalone model."""

    adapter: PeftDir
    base: BaseModel
    to: Path
    dtype: str | None  # "float32" …; None: each tensor keeps its own
    files: tuple[FilePlan, ...]
    base_precision: str = "original"  # or "dequantized": what a quantised base stands for
    note: str = ""  # what a person should know: the adapter was trained on the base in another dtype
    config: Mapping[str, Any] = field(default_factory=dict)  # keys that differ from the base's: an untied head …
    scheme: Scheme | None = None  # how the linear layers are quantised

    @property
    def operations(self) -> tuple[Operation, ...]:
        return tuple(op for file in self.files for op in file.operations)

    @property
    def merged(self) -> tuple[Operation, ...]:
        return tuple(op for op in self.operations if op.delta)

    @property
    def quantised(self) -> tuple[Operation, ...]:
        return tuple(op for op in self.operations if op.scheme)

    @property
    def bytes_read(self) -> int:
        return sum(file.stat().st_size for file in self.base.weight_files)

    @property
    def bytes_written(self) -> int:
        """Weights only. On a file system with reflinks less: what is merged."""
        return sum(file.size for file in self.files)

    @property
    def bytes_merged(self) -> int:
        return sum(op.size for op in self.merged)

    @property
    def memory(self) -> int:
        """Bytes above the interpreter with torch, an upper estimate: each worker's block, read, wide and rounded, and
        where it is quantised divided, compared and packed; two tensors' factors; what torch and numpy keep."""
        widest = max((op.source.shape[-1] for op in (*self.merged, *self.quantised)), default=1)
        copies = 8 if self.scheme else 3
        factors = max((_float32_bytes(op.delta.factor) for op in self.merged if op.delta), default=0)
        return workers() * copies * 4 * max(BLOCK, widest) + 2 * factors + _LIBRARIES

    @property
    def free(self) -> int:
        """Bytes free where the model will be written; what a killed export to the same place left counts as free."""
        return shutil.disk_usage(_existing(self.to.parent)).free + left_behind(self.to)

    @property
    def disk(self) -> int:
        """Bytes of disk that it may take: weights, and what stands beside them. With reflinks it takes less."""
        return self.bytes_written + _SIDECARS

    def to_json(self) -> dict[str, Any]:
        """What `ah export --plan --json` prints; sizes in bytes."""
        return {
            "to": str(self.to),
            "base": self.base.name,
            "base_precision": self.base_precision,
            "dtype": self.dtype or "as the base",
            "quantize": self.scheme.name if self.scheme else None,
            "group_size": self.scheme.group or None if self.scheme else None,
            "files": len(self.files),
            "tensors": {
                "merged": len(self.merged),
                "quantised": len(self.quantised),
                "saved": sum(op.saved or op.tokens is not None for op in self.operations),
                "cast": sum(op.cast for op in self.operations),
                "kept": sum(op.kept and not op.saved for op in self.operations),
            },
            "bytes_read": self.bytes_read,
            "bytes_written": self.bytes_written,
            "bytes_merged": self.bytes_merged,
            "memory": self.memory,
            "disk": self.disk,
            "disk_free": self.free,
            "note": self.note,
        }


def plan_export(
    adapter: Path,
    base: BaseModel,
    to: Path,
    *,
    dtype: str | None = None,
    quantize: str | None = None,
    group_size: int | None = None,
    base_precision: str | None = None,
    max_shard_size: int | None = None,
    recorded: BaseFingerprint | None = None,
) -> Plan:
    """Plan the export of base + adapter to the new folder ``to``. Writes nothing.

    ``dtype`` is ``float32``, ``float16`` or ``bfloat16``; left out, every tensor keeps its own. ``quantize`` is
    ``w8a8``, ``w8a16``, ``w4a16`` or ``fp8`` (`schemes`), ``group_size`` the columns under one scale of ``w4a16``.
    ``base_precision`` is ``original`` or ``dequantized``: what the adapter is merged into where the base is quantised.
    ``max_shard_size``, in bytes, spreads the weights anew; left out, the base's files stay. ``recorded`` is the
    fingerprint of the base that the adapter was trained on; where there is one, ``base`` must be that model.

    Raises:
        AdapterError: the adapter directory is broken.
        Unsupported: the adapter or the base is whole, but this cannot be merged: aLoRA, a quantised base …
        BaseMismatch: another base, by fingerprint, by name or by shape.
        AlreadyExists: ``to`` exists.
        StorageError: too little disk, a folder that cannot be written, a broken base.
        UsageError: no such dtype.
        MissingDependency: torch is not installed.
    """
    if find_spec("torch") is None:
        raise MissingDependency("exporting needs torch", hint="pip install 'adapterhub[train]'")
    if dtype is not None and dtype not in DTYPES:
        raise UsageError(f"{dtype!a} is not a dtype that can be exported", hint=f"choose one of {', '.join(DTYPES)}")
    _check_target(to)
    read = peftdir.read(adapter)
    _check_adapter(read)
    scheme = choose_scheme(base, quantize, group_size)
    _check_base(base, base_precision)
    note = base.check(recorded, what=str(adapter)) if recorded else ""
    weights = stored(base)
    changes = find_changes(read, base, weights)
    operations = _operations(read, base, weights, changes, DTYPES[dtype] if dtype else None)
    if scheme:
        operations = tuple(replace(op, scheme=scheme) if is_linear(op.source) else op for op in operations)
    plan = Plan(
        adapter=read,
        base=base,
        to=to,
        dtype=dtype,
        files=_files(base, spread(operations, max_shard_size) if max_shard_size else operations),
        base_precision="dequantized" if any(op.packing for op in operations) else "original",
        note=note,
        config={**changes.config, **(_quantised_config(scheme, base, operations) if scheme else {})},
        scheme=scheme,
    )
    _check_disk(plan)
    return plan


# ── the rules ────────────────────────────────────────────────────────────────────────────────────────────────


def _check_target(to: Path) -> None:
    try:
        to.lstat()
        taken = True
    except (FileNotFoundError, NotADirectoryError):
        taken = False
    except (OSError, ValueError) as error:
        raise UsageError(f"{str(to)!a} cannot be a folder", why=str(error), hint="name a new folder") from error
    if taken:
        raise AlreadyExists(
            f"{to} exists", why="an export never writes into a folder that is there", hint="name a new folder with --to"
        )
    parent = _existing(to.parent)
    if not parent.is_dir() or not os.access(parent, os.W_OK | os.X_OK):
        raise StorageError(
            f"{to} cannot be written",
            why=f"{parent} is {'not writable' if parent.is_dir() else 'no folder'}",
            hint="name another folder with --to",
        )


def _check_adapter(adapter: PeftDir) -> None:
    verdict = peftdir.verdicts(adapter).merge
    why = verdict.reason if verdict.answer == "no" else ""
    odd = {tensor.dtype for tensor in adapter.tensors.values()} - WIDTH.keys()
    if odd:
        why = f"its tensors are stored as {', '.join(sorted(odd))}"
    if why:
        raise Unsupported(
            f"{adapter.path} cannot be merged", why=why, hint="serve it as an adapter, or merge it with PEFT"
        )


def _check_base(base: BaseModel, precision: str | None) -> None:
    if precision not in {None, *PRECISIONS}:
        raise UsageError(f"{precision!a} is not a precision of the base", hint=f"choose one of {', '.join(PRECISIONS)}")
    check_quantisation(base, precision)
    lost = sorted((base.weight_map or {}).keys() - base.tensors.keys())
    if lost:
        raise StorageError(
            f"the base {base.name} is incomplete",
            why=f"no file holds {lost[0]}" + (f" and {len(lost) - 1} more" if len(lost) > 1 else ""),
            hint="fetch the base model again",
        )


def _quantised_config(scheme: Scheme, base: BaseModel, operations: Sequence[Operation]) -> dict[str, Any]:
    names = [op.source.name for op in operations]
    ignore = ignored(architecture(base.config).head, (op.source.name for op in operations if op.scheme), names)
    return {"quantization_config": scheme.config(ignore)}


def _operations(
    adapter: PeftDir, base: BaseModel, weights: Mapping[str, Stored], changes: Changes, dtype: str | None
) -> tuple[Operation, ...]:
    """What happens to each tensor of the checkpoint, in its order. ``dtype`` is safetensors' name."""
    usual = DTYPES.get(str(base.config.get("dtype") or base.config.get("torch_dtype")), "BF16")

    def new_dtype(weight: Stored) -> str:
        if weight.packing:
            return dtype or usual
        return dtype if dtype and weight.tensor.dtype in WIDTH else weight.tensor.dtype

    def operation(name: str, weight: Stored) -> Operation:
        change = changes.tensors.get(name, Change())
        saved = change.saved
        return Operation(
            source=replace(saved or weight.tensor, name=name),
            file=adapter.path / peftdir.WEIGHTS if saved else weight.file,
            home=weight.file.name,
            dtype=new_dtype(weight),
            delta=change.delta,
            packing=None if saved else weight.packing,
            saved=saved is not None,
            tokens=change.tokens,
        )

    found = []
    for name, weight in weights.items():
        found.append(operation(name, weight))
        if changes.head and name == changes.embedding:
            found.append(operation(changes.head, weight))
    return tuple(found)


def _files(base: BaseModel, operations: Sequence[Operation]) -> tuple[FilePlan, ...]:
    try:
        return lay_out(operations, {file.name: file for file in base.weight_files})
    except OSError as error:
        raise StorageError(f"the base {base.name} cannot be read", why=str(error)) from error


def _check_disk(plan: Plan) -> None:
    if plan.free < plan.disk:
        raise StorageError(
            f"not enough disk for {plan.to}",
            why=f"it takes {plan.disk / 1e9:.1f} GB, {plan.free / 1e9:.1f} GB are free",
            hint="make room, or name a folder on another disk with --to",
        )


def _existing(folder: Path) -> Path:
    """The folder, or the nearest above it that exists."""
    folder = folder.absolute()
    while not folder.exists() and folder != folder.parent:
        folder = folder.parent
    return folder


def _float32_bytes(factor: Factor) -> int:
    return 4 * (math.prod(factor.a.shape) + math.prod(factor.b.shape))
