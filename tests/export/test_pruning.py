"""Pruned sums of adapters: against the papers' rules written out in float64, and from the command line."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from adapterhub import peftdir
from adapterhub.export.pruning import SPARSE, add_sparse, drop, elect, trim

WEIGHTS = (0.7, -0.4, 1.5)


def changes() -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(12, 20, generator=generator, dtype=torch.float64) for _ in WEIGHTS]


def by_hand(kept: list[torch.Tensor], *, elected: bool) -> np.ndarray[Any, Any]:
    """Value by value."""
    result = np.zeros(tuple(kept[0].shape))
    for place in np.ndindex(*result.shape):
        values = [weight * float(change[place]) for weight, change in zip(WEIGHTS, kept, strict=True)]
        total = sum(values)
        if not elected:
            result[place] = total
            continue
        winners = [v for v in values if v * total > 0]
        result[place] = sum(winners) / len(winners) if winners else 0.0
    return result


@pytest.mark.parametrize("density", [0.2, 0.5, 1.0])
def test_trimmed_sums(density: float) -> None:
    kept = []
    for change in changes():
        limit = np.sort(np.abs(change.numpy()), axis=None)[-round(density * change.numel())]
        kept.append(torch.where(change.abs() >= limit, change, 0))
    for method, elected in (("ties", True), ("magnitude_prune", False)):
        made = add_sparse(changes(), WEIGHTS, method=method, density=density, seed=0, module="m")  # type: ignore[arg-type]
        np.testing.assert_allclose(made.numpy(), by_hand(kept, elected=elected), rtol=1e-12, atol=1e-12)


def test_dare_keeps_a_share_and_the_mean() -> None:
    ones = torch.ones(400, 500, dtype=torch.float64)
    kept = drop(ones, 0.3, seed=5)
    assert set(kept.unique().tolist()) == {0.0, 1 / 0.3}
    assert float(kept.mean()) == pytest.approx(1, abs=0.02)
    assert torch.equal(drop(ones, 1.0, seed=5), ones)


def test_dare_is_seeded_by_module() -> None:
    def made(seed: int, module: str) -> torch.Tensor:
        result = add_sparse(changes(), WEIGHTS, method="dare_linear", density=0.5, seed=seed, module=module)
        assert isinstance(result, torch.Tensor)
        return result

    assert torch.equal(made(1, "q"), made(1, "q"))
    assert not torch.equal(made(1, "q"), made(2, "q"))
    assert not torch.equal(made(1, "q"), made(1, "k"))


def test_nothing_is_elected_where_a_sum_is_zero() -> None:
    assert elect(torch.tensor([[[1.0, 0.0]], [[-1.0, 0.0]]])).tolist() == [[0.0, 0.0]]


def test_a_tie_is_trimmed_to_the_same_share() -> None:
    assert int(trim(torch.ones(10, 10), 0.25).count_nonzero()) == 25


def dense(folder: Path) -> dict[str, torch.Tensor]:
    adapter, tensors = peftdir.read(folder), load_file(folder / "adapter_model.safetensors")
    return {f.module: f.scale * tensors[f.b.name].double() @ tensors[f.a.name].double() for f in adapter.factors}


@pytest.mark.parametrize("method", SPARSE)
def test_rslora_is_scaled_right_and_full_rank_loses_nothing(
    method: Any, adapter_factory: Any, base_factory: Any, ah: Any, tmp_path: Path
) -> None:
    """PEFT's own merge overscales rsLoRA by √rank (peft#3761)."""
    one = adapter_factory(rank=4, alpha=8, targets=["q_proj"], config={"use_rslora": True})
    two = adapter_factory("two", rank=6, alpha=3, seed=1, targets=["q_proj"])
    words = ("merge", f"{one}:0.7", f"{two}:-0.3", "--base", base_factory().path, "--to", tmp_path / "both", "--json")
    ran = ah(*words, "--method", method, "--rank", 64, "--density", 0.4, "--seed", 3)
    assert ran.code == 0, ran.err
    assert max(json.loads(ran.out)["errors"].values()) < 1e-6
    first, second, made = dense(one), dense(two), dense(tmp_path / "both" / "adapter")
    for module, change in made.items():
        parts = [first[module], second[module]]
        want = add_sparse(parts, [0.7, -0.3], method=method, density=0.4, seed=3, module=module)
        assert float((change - want).norm() / want.norm()) < 1e-5


def test_bad_input(adapter_factory: Any, base_factory: Any, ah: Any, tmp_path: Path) -> None:
    one = adapter_factory()
    words = ("merge", one, one, "--base", base_factory().path, "--to", tmp_path / "both")
    assert "density" in ah(*words, "--method", "ties", "--rank", 4).err
    assert "rank" in ah(*words, "--method", "ties", "--density", 0.5).err
    assert "keeps every value" in ah(*words, "--method", "svd", "--rank", 4, "--density", 0.5).err
    for density in (0, 1.5, "nan"):
        assert "no share" in ah(*words, "--method", "ties", "--rank", 4, "--density", density).err
    assert not (tmp_path / "both").exists()
