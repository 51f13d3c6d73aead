"""The opposite of a merge: base + fully tuned copy → the adapter of a chosen rank that is nearest to their difference.

One tensor at a time: its difference in float32, then its largest singular directions by subspace iteration from a
random start (Halko, Martinsson, Tropp, arXiv:0909.4061, algorithms 4.4 and 5.1), or exactly where it is small. What the
factors leave out is computed, not estimated. LoRA holds linear layers alone: what changed elsewhere is told, and lost.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from adapterhub.base import BaseModel
from adapterhub.errors import AdapterError, UsageError
from adapterhub.export.arithmetic import read_float32
from adapterhub.export.combine import nearest
from adapterhub.export.plainlora import refuse_taken, write_run
from adapterhub.export.tuned import Pair, pairs
from adapterhub.manifest import Lineage
from adapterhub.registry.drafts import BESIDE
from adapterhub.runrecord import ADAPTER, RunRecord

FILE = "extract.json"  # beside the factors

_OVERSAMPLED = 16  # directions more than the rank
_PASSES = 4  # over the difference and back


@dataclass(frozen=True)
class Extracted:
    """An adapter, and what it does not hold. Errors and changes are in the Frobenius norm."""

    path: Path
    ranks: Mapping[str, int]  # module → rank
    errors: Mapping[str, float]  # module → ‖ΔW − B·A‖ / ‖ΔW‖
    lost: Mapping[str, float]  # tensor that LoRA cannot hold → ‖ΔW‖ / ‖W‖, W the larger of the two
    error: float  # over all modules: ‖ΔW − B·A‖ / ‖ΔW‖

    def to_json(self) -> dict[str, Any]:
        return {
            "path": str(self.path),
            "error": self.error,
            "ranks": dict(self.ranks),
            "errors": dict(self.errors),
            "lost": dict(self.lost),
        }


def extract(
    base: BaseModel,
    tuned: BaseModel,
    to: Path,
    *,
    rank: int,
    progress: Callable[[int], None] | None = None,
) -> Extracted:
    """Write ``to``, a run's folder that `ah publish` takes: the adapter that makes ``tuned`` of ``base``, nearly.

    Memory: two to three times the largest tensor in float32, and the factors. ``progress`` is called with bytes read.

    Raises:
        UsageError: ``rank`` is not positive.
        BaseMismatch: the two are different models. Unsupported: an architecture, dtype or vocabulary.
        AdapterError: no linear layer differs, or a weight is NaN or infinite.
        AlreadyExists: ``to`` exists. StorageError: it cannot be written, or a model cannot be read.
    """
    if rank < 1:
        raise UsageError(f"rank {rank} is not positive", hint="--rank 16")
    refuse_taken(to)
    factors: dict[str, tuple[Any, Any]] = {}
    errors, lost = {}, {}
    left = whole = 0.0
    for pair in pairs(base, tuned):
        if not pair.same():
            change, of = _difference(pair)
            norm = float(change.norm())
            if norm and pair.linear:
                module = pair.name.removesuffix(".weight")
                a, b, rest = low_rank(change, rank)
                factors[module], errors[module] = (a, b), rest / norm
                left, whole = left + rest**2, whole + norm**2
            elif norm:
                lost[pair.name] = norm / of
        if progress:
            progress(pair.size)
    if not factors:
        why = f"{len(lost)} other tensors differ, such as {min(lost)}" if lost else "all tensors are equal"
        raise AdapterError(f"no linear layer of {tuned.name} differs from {base.name}", why=why)
    ranks = {module: a.shape[0] for module, (a, _) in factors.items()}
    result = Extracted(to, ranks, errors, lost, (left / whole) ** 0.5)
    write_run(
        to,
        factors,
        record=RunRecord(base=base.fingerprint, lineage=Lineage(method="extract", metrics={"error": result.error})),
        task_type="CAUSAL_LM",
        base_name=base.name,
        beside=lambda folder: _put_beside(folder, result, tuned=tuned),
    )
    return result


def low_rank(change: Any, rank: int) -> tuple[Any, Any, float]:
    """A (rank, in) and B (out, rank) nearest to ``change`` (out, in), and ‖change − B·A‖."""
    import torch

    wanted = rank + _OVERSAMPLED
    if min(change.shape) <= 4 * wanted:
        a, b, _ = nearest(change, rank)
        return a, b, float(torch.addmm(change, b, a, alpha=-1).norm())
    generator = torch.Generator().manual_seed(0)
    basis = torch.linalg.qr(change @ torch.randn(change.shape[1], wanted, generator=generator)).Q
    for _ in range(_PASSES):
        basis = torch.linalg.qr(change @ torch.linalg.qr(change.T @ basis).Q).Q
    a, b, _ = nearest(basis.T @ change, rank)
    b = basis @ b
    return a, b, float(torch.addmm(change, b, a, alpha=-1).norm())


def _difference(pair: Pair) -> tuple[Any, float]:
    """tuned − base in float32, and the norm of the larger of the two."""
    old, new = (read_float32(tensor, file) for file, tensor in (pair.before, pair.after))
    of = max(float(old.norm()), float(new.norm()))
    change = new.sub_(old)
    if not bool(change.isfinite().all()):
        raise AdapterError(f"{pair.name} is broken", why="it holds NaN or infinite values in one of the models")
    return change, of


def _put_beside(folder: Path, result: Extracted, *, tuned: BaseModel) -> None:
    """The tuned model's tokenizer and template, which it must be asked with; what was lost, for programs and people."""
    for name in BESIDE:
        if (tuned.path / name).is_file() and name != "README.md":
            shutil.copyfile(tuned.path / name, folder / name)
    told = result.to_json() | {"path": ADAPTER, "tuned": tuned.name}
    (folder / FILE).write_text(json.dumps(told, indent=1) + "\n", encoding="utf-8")
    (folder / "README.md").write_text(_card(result, tuned), encoding="utf-8")


def _card(result: Extracted, tuned: BaseModel) -> str:
    rows = "".join(f"| {module} | {error:.4f} |\n" for module, error in result.errors.items())
    lost = "".join(f"| {name} | {change:.2e} |\n" for name, change in result.lost.items())
    text = (
        f"# Extracted from {tuned.name}\n\n"
        f"The difference between {tuned.name} and its base, as LoRA of rank {max(result.ranks.values())}. Of the"
        f" difference in the linear layers, {result.error:.1%} (Frobenius) is not in it.\n\n"
        f"| layer | left out, of its change |\n|---|---|\n{rows}"
    )
    if lost:
        text += "\nNot held at all, because LoRA has no place for it:\n\n"
        text += f"| tensor | change, of its size |\n|---|---|\n{lost}"
    return text
