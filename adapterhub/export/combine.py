"""Several adapters of one base as one: ΔW = Σ wᵢ·sᵢ·BᵢAᵢ, module by module, from the factors alone.

    cat    the factors stacked: exact, of the ranks' sum
    svd    the best approximation of a chosen rank (Eckart–Young), by QR of the stacked factors; its error is told

Every scale is folded into B and the result has alpha = rank, so that no reader can scale it in another way: rsLoRA
and alpha patterns end here. Adding the As and the Bs apart ("linear") is no sum of adapters, and is not offered.
"""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from adapterhub import peftdir
from adapterhub.errors import AdapterError, AlreadyExists, StorageError, Unsupported, UsageError
from adapterhub.export.arithmetic import _read as read_tensor
from adapterhub.peftdir import CONFIG, WEIGHTS, PeftDir
from adapterhub.runrecord import ADAPTER, FILE, RunRecord

Method = Literal["cat", "svd"]


@dataclass(frozen=True)
class Part:
    """One adapter and how much of it."""

    path: Path
    weight: float


@dataclass(frozen=True)
class Combined:
    """What was written, and what it lost: ‖sum − result‖ / ‖sum‖ in the Frobenius norm, by module; 0 for cat."""

    path: Path
    ranks: Mapping[str, int]
    errors: Mapping[str, float]


def stack(parts: Sequence[tuple[Any, Any, float]]) -> tuple[Any, Any]:
    """A (Σr, in) and B (out, Σr) with B·A = Σ scale·B·A, from ``(A, B, scale)`` of each adapter."""
    import torch

    return torch.cat([a for a, _, _ in parts]), torch.cat([scale * b for _, b, scale in parts], dim=1)


def shrink(a: Any, b: Any, rank: int) -> tuple[Any, Any, float]:
    """The factors of rank ≤ ``rank`` nearest to B·A, and the relative error; B·A itself is never formed."""
    import torch

    q_b, r_b = torch.linalg.qr(b.double())
    q_a, r_a = torch.linalg.qr(a.double().T)
    u, s, v = torch.linalg.svd(r_b @ r_a.T, full_matrices=False)
    kept = min(rank, len(s))
    root = s[:kept].sqrt()
    norm = float(s.norm())
    error = float(s[kept:].norm()) / norm if norm else 0.0
    return root[:, None] * (v[:kept] @ q_a.T), (q_b @ u[:, :kept]) * root, error


def combine(parts: Sequence[Part], to: Path, *, method: Method, record: RunRecord, rank: int | None = None) -> Combined:
    """Write ``to``, a run's folder that `ah publish` takes: ``run.json`` (``record``) and ``adapter/``.

    Raises:
        AdapterError: a part is broken, or its shapes are not those of the others.
        Unsupported: a part is no plain LoRA.
        UsageError: fewer than two parts, or a rank where the method has none.
        AlreadyExists: ``to`` exists. StorageError: it cannot be written.
    """
    from safetensors.torch import save_file

    _check(parts, method, rank)
    if to.exists() or to.is_symlink():
        raise AlreadyExists(f"{to} exists", hint="name a new folder with --to")
    adapters = [(_read(part), part.weight) for part in parts]
    tensors, ranks, errors = _modules(adapters, rank if method == "svd" else None)
    try:
        to.parent.mkdir(parents=True, exist_ok=True)
        hidden = Path(tempfile.mkdtemp(prefix=f".{to.name}-", dir=to.parent))
        try:
            folder = hidden / ADAPTER
            folder.mkdir()
            save_file(tensors, folder / WEIGHTS, metadata={"format": "pt"})
            config = _config(adapters[0][0], ranks)
            (folder / CONFIG).write_text(json.dumps(config, indent=1) + "\n", encoding="utf-8")
            record.write(hidden / FILE)
            hidden.chmod(0o777 & ~_umask())
            hidden.rename(to)
        finally:
            shutil.rmtree(hidden, ignore_errors=True)
    except OSError as error:
        raise StorageError(f"{to} cannot be written", why=error.strerror or str(error)) from error
    return Combined(to, ranks, errors)


def _check(parts: Sequence[Part], method: Method, rank: int | None) -> None:
    if len(parts) < 2:
        raise UsageError("a merge needs two adapters or more", hint="ah merge acme/a@1:0.7 acme/b@2:0.3 --to DIR")
    if (method == "svd") != (rank is not None):
        why = "svd needs the rank of the result" if rank is None else "cat has the sum of all ranks"
        raise UsageError("--rank and --method do not fit", why=why, hint="--method svd --rank 16")
    if rank is not None and rank < 1:
        raise UsageError(f"rank {rank} is not positive", hint="--rank 16")


def _read(part: Part) -> PeftDir:
    adapter = peftdir.read(part.path)
    verdict = peftdir.verdicts(adapter).merge
    if verdict.answer == "no":
        raise Unsupported(f"{part.path} cannot be merged", why=verdict.reason)
    if adapter.config.get("fan_in_fan_out") or any(len(f.a.shape) != 2 or len(f.b.shape) != 2 for f in adapter.factors):
        raise Unsupported(f"{part.path} cannot be merged with others", why="it is not on plain linear layers alone")
    odd = next((t for t in adapter.tensors.values() if t.dtype not in {"F32", "F16", "BF16"}), None)
    if odd is not None:
        raise Unsupported(f"{part.path} cannot be merged", why=f"{odd.name} is stored as {odd.dtype}")
    return adapter


def _modules(
    adapters: Sequence[tuple[PeftDir, float]], rank: int | None
) -> tuple[dict[str, Any], dict[str, int], dict[str, float]]:
    found: dict[str, list[tuple[Any, Any, float]]] = {}
    tensors: dict[str, Any] = {}
    ranks, errors = {}, {}
    for adapter, weight in adapters:
        for f in adapter.factors:
            file = adapter.path / WEIGHTS
            found.setdefault(f.module, []).append((read_tensor(f.a, file), read_tensor(f.b, file), f.scale * weight))
    for module, parts in sorted(found.items()):
        if len({(a.shape[1], b.shape[0]) for a, b, _ in parts}) > 1:
            raise AdapterError(f"{module} has another shape in each adapter", why="they are for different bases")
        a, b = stack(parts)
        errors[module] = 0.0
        if rank is not None:
            a, b, errors[module] = shrink(a, b, rank)
        ranks[module] = a.shape[0]
        tensors[f"base_model.model.{module}.lora_A.weight"] = a.float().contiguous()
        tensors[f"base_model.model.{module}.lora_B.weight"] = b.float().contiguous()
    return tensors, ranks, errors


def _config(first: PeftDir, ranks: Mapping[str, int]) -> dict[str, Any]:
    """Plain LoRA of scale 1 everywhere, also for a reader that knows no patterns."""
    largest = max(ranks.values())
    other = {module.replace(".", r"\."): rank for module, rank in ranks.items() if rank != largest}
    return {
        "peft_type": "LORA",
        "task_type": first.config.get("task_type"),
        "base_model_name_or_path": first.config.get("base_model_name_or_path"),
        "inference_mode": True,
        "bias": "none",
        "r": largest,
        "lora_alpha": largest,
        "rank_pattern": other,
        "alpha_pattern": other,
        "target_modules": sorted(ranks),
    }


def _umask() -> int:
    mask = os.umask(0o022)
    os.umask(mask)
    return mask
