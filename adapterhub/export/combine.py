"""Several adapters of one base as one: ΔW = Σ wᵢ·sᵢ·BᵢAᵢ, module by module, from the factors alone.

    cat    the factors stacked: exact, of the ranks' sum
    svd    the best approximation of a chosen rank (Eckart–Young), by QR of the stacked factors; its error is told
    ties, dare_ties, dare_linear, magnitude_prune
           pruned sums of the dense changes (`pruning`), one module at a time, then the nearest of a chosen rank

Every scale is folded into B and the result has alpha = rank, so that no reader can scale it in another way: rsLoRA
and alpha patterns end here. Adding the As and the Bs apart ("linear") is no sum of adapters, and is not offered.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, cast

from adapterhub import peftdir
from adapterhub.errors import AdapterError, Unsupported, UsageError
from adapterhub.export.arithmetic import read_float32
from adapterhub.export.plainlora import refuse_taken, write_run
from adapterhub.export.pruning import SPARSE, Sparse, add_sparse
from adapterhub.peftdir import WEIGHTS, Factor, PeftDir
from adapterhub.runrecord import RunRecord

Method = Literal["cat", "svd", "ties", "dare_ties", "dare_linear", "magnitude_prune"]


@dataclass(frozen=True)
class Part:
    """One adapter and how much of it."""

    path: Path
    weight: float


@dataclass(frozen=True)
class Recipe:
    """How they are added."""

    method: Method = "cat"
    rank: int | None = None  # of the result; cat has the sum of all ranks
    density: float | None = None  # share of the values that is kept, for the pruned sums
    seed: int = 0  # of what DARE drops


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


def nearest(whole: Any, rank: int) -> tuple[Any, Any, float]:
    """The factors of rank ≤ ``rank`` nearest to a dense change (out, in), and the relative error."""
    import torch

    u, s, v = torch.linalg.svd(whole, full_matrices=False)
    kept = min(rank, len(s))
    root = s[:kept].sqrt()
    norm = float(s.norm())
    return root[:, None] * v[:kept], u[:, :kept] * root, float(s[kept:].norm()) / norm if norm else 0.0


def combine(parts: Sequence[Part], to: Path, *, recipe: Recipe, record: RunRecord) -> Combined:
    """Write ``to``, a run's folder that `ah publish` takes: ``run.json`` (``record``) and ``adapter/``.

    Raises:
        AdapterError: a part is broken, or its shapes are not those of the others.
        Unsupported: a part is no plain LoRA.
        UsageError: fewer than two parts, or a rank or density that the method does not have.
        AlreadyExists: ``to`` exists. StorageError: it cannot be written.
    """
    _check(parts, recipe)
    refuse_taken(to)
    adapters = [(_read(part), part.weight) for part in parts]
    factors, errors = _modules(adapters, recipe)
    first = adapters[0][0].config
    write_run(
        to,
        factors,
        record=record,
        task_type=first.get("task_type"),
        base_name=first.get("base_model_name_or_path"),
    )
    return Combined(to, {module: a.shape[0] for module, (a, _) in factors.items()}, errors)


def _check(parts: Sequence[Part], recipe: Recipe) -> None:
    if len(parts) < 2:
        raise UsageError("a merge needs two adapters or more", hint="ah merge acme/a@1:0.7 acme/b@2:0.3 --to DIR")
    if (recipe.method == "cat") != (recipe.rank is None):
        why = "cat has the sum of all ranks" if recipe.rank is not None else f"{recipe.method} needs the result's rank"
        raise UsageError("--rank and --method do not fit", why=why, hint="--method svd --rank 16")
    if recipe.rank is not None and recipe.rank < 1:
        raise UsageError(f"rank {recipe.rank} is not positive", hint="--rank 16")
    if (recipe.method in SPARSE) != (recipe.density is not None):
        why = f"{recipe.method} keeps every value" if recipe.density is not None else f"{recipe.method} needs a density"
        raise UsageError("--density and --method do not fit", why=why, hint="--method ties --rank 16 --density 0.5")
    if recipe.density is not None and not 0 < recipe.density <= 1:
        raise UsageError(
            f"density {recipe.density:g} is no share", why="it is above 0 and at most 1", hint="--density 0.5"
        )


def _read(part: Part) -> PeftDir:
    adapter = peftdir.read(part.path)
    if why := peftdir.plain_reason(adapter):
        raise Unsupported(f"{part.path} cannot be merged with others", why=why)
    if adapter.config.get("fan_in_fan_out") or any(len(f.a.shape) != 2 or len(f.b.shape) != 2 for f in adapter.factors):
        raise Unsupported(f"{part.path} cannot be merged with others", why="it is not on plain linear layers alone")
    odd = next((t for t in adapter.tensors.values() if t.dtype not in {"F32", "F16", "BF16"}), None)
    if odd is not None:
        raise Unsupported(f"{part.path} cannot be merged", why=f"{odd.name} is stored as {odd.dtype}")
    return adapter


def _modules(
    adapters: Sequence[tuple[PeftDir, float]], recipe: Recipe
) -> tuple[dict[str, tuple[Any, Any]], dict[str, float]]:
    found: dict[str, list[tuple[PeftDir, Factor, float]]] = {}
    factors: dict[str, tuple[Any, Any]] = {}
    errors = {}
    for adapter, weight in adapters:
        for factor in adapter.factors:
            found.setdefault(factor.module, []).append((adapter, factor, weight))
    for module, parts in sorted(found.items()):
        if len({(f.a.shape[1], f.b.shape[0]) for _, f, _ in parts}) > 1:
            raise AdapterError(f"{module} has another shape in each adapter", why="they are for different bases")
        a, b, errors[module] = _add(module, parts, recipe)
        factors[module] = (a.float(), b.float())
    return factors, errors


def _add(module: str, parts: Sequence[tuple[PeftDir, Factor, float]], recipe: Recipe) -> tuple[Any, Any, float]:
    """A and B of one module of the result, and the relative error."""
    read = [
        (read_float32(f.a, adapter.path / WEIGHTS), read_float32(f.b, adapter.path / WEIGHTS), f.scale, weight)
        for adapter, f, weight in parts
    ]
    if recipe.density is not None and recipe.rank is not None:
        changes = [scale * (b.double() @ a.double()) for a, b, scale, _ in read]
        method = cast(Sparse, recipe.method)
        weights = [weight for _, _, _, weight in read]
        whole = add_sparse(changes, weights, method=method, density=recipe.density, seed=recipe.seed, module=module)
        return nearest(whole, recipe.rank)
    a, b = stack([(a, b, scale * weight) for a, b, scale, weight in read])
    return (a, b, 0.0) if recipe.rank is None else shrink(a, b, recipe.rank)
