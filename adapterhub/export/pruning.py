"""Sums of dense changes in which adapters do not drown each other: TIES, DARE and pruning by magnitude.

    trim    keep the largest values of each change            (TIES, arXiv:2306.01708, 3.1)
    drop    keep values at random, scaled by 1/density        (DARE, arXiv:2311.03099, eq. 4)
    elect   where signs differ, the side with more weight wins; the mean is over its adapters alone (TIES, 3.2 and 3.3)

They work on ΔW = s·B·A itself. On A and B apart, as some tools do it, pruning and signs mean nothing for the product.
"""

from __future__ import annotations

import zlib
from collections.abc import Sequence
from typing import Any, Literal, get_args

Sparse = Literal["ties", "dare_ties", "dare_linear", "magnitude_prune"]
SPARSE: tuple[str, ...] = get_args(Sparse)


def add_sparse(
    changes: Sequence[Any], weights: Sequence[float], *, method: Sparse, density: float, seed: int, module: str
) -> Any:
    """One change (out, in) of several of that shape. ``density`` in (0, 1] is the share of values that is kept.

    ``seed`` and ``module`` choose what DARE drops: the same on every machine, and not the same in every module.
    """
    import torch

    if method.startswith("dare"):
        kept = [drop(change, density, seed=_seed(seed, i, module)) for i, change in enumerate(changes)]
    else:
        kept = [trim(change, density) for change in changes]
    weighted = torch.stack([weight * change for weight, change in zip(weights, kept, strict=True)])
    return elect(weighted) if method.endswith("ties") else weighted.sum(0)


def trim(change: Any, density: float) -> Any:
    """The ``density`` of the values with the largest magnitude; zero elsewhere."""
    import torch

    count = max(1, round(density * change.numel()))
    kept = change.abs().flatten().topk(count, sorted=False).indices
    trimmed = torch.zeros_like(change).flatten()
    trimmed[kept] = change.flatten()[kept]
    return trimmed.view_as(change)


def drop(change: Any, density: float, *, seed: int) -> Any:
    """Each value with the probability ``density``, divided by it: the same change on average."""
    import torch

    chosen = torch.rand(change.shape, generator=torch.Generator().manual_seed(seed)) < density
    return torch.where(chosen, change / density, torch.zeros_like(change))


def elect(weighted: Any) -> Any:
    """The mean of the values that have the sign of their sum; ``weighted`` is (adapters, out, in)."""
    sign = weighted.sum(0).sign()
    agreeing = (weighted.sign() == sign) & (sign != 0)
    return (weighted * agreeing).sum(0) / agreeing.sum(0).clamp(min=1)


def _seed(seed: int, adapter: int, module: str) -> int:
    return zlib.crc32(f"{seed} {adapter} {module}".encode())
