"""How two versions differ: what is said of them, and their changes of the base, from the factors alone. No torch.

With ΔW = s·BA, of one module of two adapters:

    ‖ΔW‖²       s² · tr((BᵀB)(AAᵀ)): r×r, however large the module
    ‖ΔW₁−ΔW₂‖   of [s₁B₁, −s₂B₂]·[A₁; A₂] by QR of both sides, because the traces of near-equal adapters cancel
    cosine      ⟨ΔW₁, ΔW₂⟩ / ‖ΔW₁‖‖ΔW₂‖: 1 for equal directions, 0 for unrelated ones
    overlap     ‖U₁ᵀU₂‖²_F / min(r₁, r₂) with orthonormal bases U of the column spaces of the Bs (what is written) or of
                the row spaces of the As (what is read): 0 to 1 (Hu et al., LoRA, arXiv:2106.09685, eq. 4)
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from adapterhub.errors import AdapterError, Unsupported
from adapterhub.manifest import to_plain
from adapterhub.peftdir import WEIGHTS, Factor, PeftDir, Tensor, read
from adapterhub.registry.base import Evaluation, Version
from adapterhub.registry.rules import newest_measured

_LAYER = re.compile(r"(.*?\.(?:layers|h|blocks?)\.\d+)\.")


@dataclass(frozen=True)
class Change:
    """What two adapters do to one module, or to all modules of one layer. Norms are Frobenius'."""

    where: str
    norms: tuple[float, float]  # ‖ΔW₁‖, ‖ΔW₂‖; 0 where an adapter leaves it alone
    apart: float  # ‖ΔW₁ − ΔW₂‖
    cosine: float | None  # None where one of them is zero
    overlap_in: float | None  # None where one of them is not there
    overlap_out: float | None


def facts(one: Version, evaluations: Sequence[Evaluation], config: Mapping[str, Any]) -> dict[str, Any]:
    """What is said of a version, flat: the difference of two is the keys whose values differ."""
    record, manifest = one.record, one.record.manifest
    lineage = to_plain(manifest.lineage)
    said: dict[str, Any] = {
        "status": one.status,
        "author": record.author,
        "created": record.created,
        "size": manifest.size,
        "base": to_plain(manifest.base) if manifest.base else None,
        "chat_template": manifest.chat_template_sha256,
        "tokenizer": manifest.tokenizer_sha256,
        "training": {key: lineage[key] for key in ("method", "parents", "config_sha256", "seed")},
        "data": lineage["data_sha256"],
        "packages": lineage["environment"],
        "labels": record.labels,
        "metrics": lineage["metrics"],
        "evaluations": newest_measured(evaluations),
        "verdicts": {use: verdict["answer"] for use, verdict in to_plain(record.verdicts).items()},
        "lora": to_plain(manifest.lora),
        "config": config,
    }
    return dict(_flat(said))


def _flat(value: Mapping[str, Any], prefix: str = "") -> Iterable[tuple[str, Any]]:
    for key, inner in value.items():
        if isinstance(inner, Mapping):
            yield from _flat(inner, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", inner


def differing(first: Mapping[str, Any], second: Mapping[str, Any]) -> dict[str, tuple[Any, Any]]:
    """Key → both values; None where one has none."""
    keys = dict.fromkeys([*first, *second])
    return {key: (first.get(key), second.get(key)) for key in keys if first.get(key) != second.get(key)}


def changes(first: Path, second: Path) -> list[Change]:
    """Module by module, of two adapter directories.

    Raises:
        AdapterError: one is broken, or a module has other shapes in the two.
        Unsupported: the factors are not the whole change (DoRA, whole modules), or have a dtype of 8 bits.
    """
    sides = [_plain(read(path)) for path in (first, second)]
    factors = [{factor.module: factor for factor in side.factors} for side in sides]
    return [
        _change(module, *[_read(side, its.get(module)) for side, its in zip(sides, factors, strict=True)])
        for module in sorted(factors[0].keys() | factors[1].keys(), key=_natural)
    ]


def by_layer(modules: Sequence[Change]) -> list[Change]:
    """Layer by layer: norms and cosines of all its modules as one vector, overlaps as their mean."""
    layers: dict[str, list[Change]] = {}
    for module in modules:
        match = _LAYER.match(module.where)
        layers.setdefault(match[1] if match else module.where, []).append(module)
    return [total(where, its) for where, its in layers.items()]


def total(where: str, its: Sequence[Change]) -> Change:
    """Several modules as one."""
    norms = (math.hypot(*(m.norms[0] for m in its)), math.hypot(*(m.norms[1] for m in its)))
    dot = sum((m.cosine or 0.0) * m.norms[0] * m.norms[1] for m in its)
    return Change(
        where,
        norms,
        math.hypot(*(m.apart for m in its)),
        dot / (norms[0] * norms[1]) if all(norms) else None,
        _mean([m.overlap_in for m in its]),
        _mean([m.overlap_out for m in its]),
    )


def _mean(values: Iterable[float | None]) -> float | None:
    there = [value for value in values if value is not None]
    return sum(there) / len(there) if there else None


def _natural(module: str) -> list[tuple[int, str]]:
    """Layer 2 before layer 10."""
    return [(int(part), "") if part.isdigit() else (-1, part) for part in module.split(".")]


def _plain(adapter: PeftDir) -> PeftDir:
    variant = "a DoRA adapter" if adapter.config.get("use_dora") else "an adapter with whole modules or biases"
    if adapter.config.get("use_dora") or adapter.others:
        raise Unsupported(
            "the weights cannot be compared",
            why=f"{variant} changes more than its factors tell",
            hint="compare what is said of them: ah diff --no-weights",
        )
    return adapter


def _read(adapter: PeftDir, factor: Factor | None) -> tuple[Any, Any, float] | None:
    """A (rank, in) and B (out, rank) in float64, and the scale."""
    if factor is None:
        return None
    a, b = (_array(adapter.path / WEIGHTS, tensor) for tensor in (factor.a, factor.b))
    return a, b, factor.scale


def _array(file: Path, tensor: Tensor) -> Any:
    import numpy as np

    kinds = {"F64": "<f8", "F32": "<f4", "F16": "<f2", "BF16": "<u2"}
    if tensor.dtype not in kinds or len(tensor.shape) != 2:
        raise Unsupported(
            "the weights cannot be compared",
            why=f"{tensor.name} is {tensor.dtype} of the shape {list(tensor.shape)}",
            hint="compare what is said of them: ah diff --no-weights",
        )
    flat = np.fromfile(file, kinds[tensor.dtype], count=math.prod(tensor.shape), offset=tensor.start)
    if tensor.dtype == "BF16":  # the upper half of a float32
        flat = (flat.astype("<u4") << 16).view("<f4")
    return flat.astype(np.float64).reshape(tensor.shape)


def _change(module: str, first: Any, second: Any) -> Change:
    if first is None or second is None:
        norm = _norm(*(first or second))
        return Change(module, (norm, 0.0) if first else (0.0, norm), norm, None, None, None)
    (a1, b1, s1), (a2, b2, s2) = first, second
    if a1.shape[1] != a2.shape[1] or b1.shape[0] != b2.shape[0]:
        raise AdapterError(
            f"{module} has other shapes in the two adapters",
            why=f"{b1.shape[0]}×{a1.shape[1]} and {b2.shape[0]}×{a2.shape[1]}: they were trained on different bases",
            hint="compare what is said of them: ah diff --no-weights",
        )
    norms = _norm(a1, b1, s1), _norm(a2, b2, s2)
    dot = s1 * s2 * float(((b1.T @ b2) * (a1 @ a2.T)).sum())
    cosine = max(-1.0, min(1.0, dot / (norms[0] * norms[1]))) if all(norms) else None
    return Change(module, norms, _apart(first, second), cosine, _overlap(a1.T, a2.T), _overlap(b1, b2))


def _norm(a: Any, b: Any, scale: float) -> float:
    return abs(scale) * math.sqrt(max(0.0, float(((b.T @ b) * (a @ a.T)).sum())))


def _apart(first: tuple[Any, Any, float], second: tuple[Any, Any, float]) -> float:
    import numpy as np

    (a1, b1, s1), (a2, b2, s2) = first, second
    left: Any = np.linalg.qr(np.hstack([s1 * b1, -s2 * b2]), mode="r")
    right: Any = np.linalg.qr(np.vstack([a1, a2]).T, mode="r")
    return float(np.linalg.norm(left @ right.T))


def _overlap(first: Any, second: Any) -> float | None:
    """Of the column spaces."""
    import numpy as np

    u1, u2 = _basis(first), _basis(second)
    smaller = min(u1.shape[1], u2.shape[1])
    return float(np.linalg.norm(u1.T @ u2) ** 2) / smaller if smaller else None


def _basis(matrix: Any) -> Any:
    """An orthonormal basis of the column space; directions below rounding are none."""
    import numpy as np

    u, s, _ = np.linalg.svd(matrix, full_matrices=False)
    return u[:, s > s[0] * max(matrix.shape) * np.finfo(np.float32).eps] if s[0] > 0 else u[:, :0]
