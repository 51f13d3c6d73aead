"""What the factors tell of two changes, against the dense matrices."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from adapterhub.errors import AdapterError, Unsupported
from adapterhub.registry.views.difference import by_layer, changes, differing, total

WEIGHTS = "adapter_model.safetensors"
Factory = Callable[..., Path]


def dense(adapter: Path, module: str) -> Any:
    config = json.loads((adapter / "adapter_config.json").read_text())
    tensors = load_file(adapter / WEIGHTS)
    a, b = (tensors[f"base_model.model.{module}.lora_{kind}.weight"].astype(np.float64) for kind in ("A", "B"))
    return config["lora_alpha"] / config["r"] * b @ a


def test_norms_and_cosines_are_those_of_the_dense_change(adapter_factory: Factory) -> None:
    one, two = adapter_factory("one", rank=4, seed=1), adapter_factory("two", rank=8, alpha=4, seed=2)
    found = changes(one, two)
    assert len(found) == 14
    for change in found:
        first, second = dense(one, change.where), dense(two, change.where)
        norms = [np.linalg.norm(first), np.linalg.norm(second)]
        assert change.norms == pytest.approx(norms)
        assert change.apart == pytest.approx(np.linalg.norm(first - second))
        assert change.cosine == pytest.approx((first * second).sum() / np.prod(norms))


def test_overlaps_are_those_of_the_singular_vectors(adapter_factory: Factory) -> None:
    one, two = adapter_factory("one", rank=4, seed=1), adapter_factory("two", rank=2, seed=2)
    for change in changes(one, two):
        u, v = [], []
        for adapter, rank in ((one, 4), (two, 2)):
            left, _, right = np.linalg.svd(dense(adapter, change.where))
            u.append(left[:, :rank])
            v.append(right[:rank].T)
        assert change.overlap_out == pytest.approx(np.linalg.norm(u[0].T @ u[1]) ** 2 / 2)
        assert change.overlap_in == pytest.approx(np.linalg.norm(v[0].T @ v[1]) ** 2 / 2)


def test_near_equal_adapters_are_told_apart(adapter_factory: Factory, tmp_path: Path) -> None:
    """By the traces alone the difference would be lost in the rounding of the squares."""
    one, two = adapter_factory("one", seed=1), adapter_factory("two", seed=1)
    tensors = {name: tensor.astype(np.float64) for name, tensor in load_file(one / WEIGHTS).items()}
    save_file(tensors, one / WEIGHTS)
    near = {name: tensor * (1 + 1e-11) if "lora_B" in name else tensor for name, tensor in tensors.items()}
    save_file(near, two / WEIGHTS)
    for change in changes(one, two):
        assert change.apart == pytest.approx(change.norms[0] * 1e-11, rel=1e-3)
        assert (change.cosine, change.overlap_in, change.overlap_out) == pytest.approx((1, 1, 1))


def test_bfloat16_and_float16_are_read(adapter_factory: Factory) -> None:
    one, two = adapter_factory("one", seed=1), adapter_factory("two", seed=1, dtype="float16")
    assert total("all", changes(one, two)).cosine == pytest.approx(1, abs=1e-3)
    raw = {name: tensor.view("<u4") >> 16 for name, tensor in load_file(one / WEIGHTS).items()}
    offset, header, data = 0, {}, b""
    for name, tensor in raw.items():
        part = tensor.astype("<u2").tobytes()
        header[name] = {"dtype": "BF16", "shape": list(tensor.shape), "data_offsets": [offset, offset + len(part)]}
        offset, data = offset + len(part), data + part
    encoded = json.dumps(header).encode()
    (two / WEIGHTS).write_bytes(len(encoded).to_bytes(8, "little") + encoded + data)
    assert total("all", changes(one, two)).cosine == pytest.approx(1, abs=1e-3)


def test_a_module_of_one_adapter_alone(adapter_factory: Factory) -> None:
    one, two = adapter_factory("one", targets=["q_proj"]), adapter_factory("two", targets=["q_proj", "v_proj"])
    alone = [change for change in changes(one, two) if change.where.endswith("v_proj")]
    assert [(c.norms[0], c.apart, c.cosine, c.overlap_in) for c in alone] == [
        (0, c.norms[1], None, None) for c in alone
    ]
    assert len(alone) == 2 and all(change.apart > 0 for change in alone)


def test_layers_are_their_modules_together(adapter_factory: Factory) -> None:
    one, two = adapter_factory("one", seed=1), adapter_factory("two", seed=2)
    modules = changes(one, two)
    layers = by_layer(modules)
    assert [layer.where for layer in layers] == ["model.layers.0", "model.layers.1"]
    for layer in layers:
        its = [m.where for m in modules if m.where.startswith(layer.where)]
        first, second = (np.concatenate([dense(side, module).ravel() for module in its]) for side in (one, two))
        assert layer.norms == pytest.approx((np.linalg.norm(first), np.linalg.norm(second)))
        assert layer.apart == pytest.approx(np.linalg.norm(first - second))
        assert layer.cosine == pytest.approx(first @ second / np.linalg.norm(first) / np.linalg.norm(second))


def test_an_adapter_that_changes_nothing(adapter_factory: Factory) -> None:
    one, two = adapter_factory("one", scale=0), adapter_factory("two")
    change = total("all", changes(one, two))
    assert (change.norms[0], change.cosine, change.overlap_in) == (0, None, None)
    assert change.apart == pytest.approx(change.norms[1])


def test_what_cannot_be_compared_is_refused(adapter_factory: Factory, tmp_path: Path) -> None:
    plain = adapter_factory("plain")
    with pytest.raises(Unsupported, match="cannot be compared"):
        changes(plain, adapter_factory("dora", config={"use_dora": True}))
    whole = adapter_factory("whole")
    save_file(load_file(whole / WEIGHTS) | {"base_model.model.lm_head.weight": np.ones((2, 2))}, whole / WEIGHTS)
    with pytest.raises(Unsupported):
        changes(whole, plain)
    wide = adapter_factory("wide")
    wider = {n: np.repeat(t, 2, axis=int("A" in n[-9:])) for n, t in load_file(wide / WEIGHTS).items()}
    save_file(wider, wide / WEIGHTS)
    with pytest.raises(AdapterError, match="other shapes"):
        changes(plain, wide)


def test_what_differs_is_told_once() -> None:
    assert differing({"a": 1, "b": 2}, {"a": 1, "b": 3, "c": None, "d": 4}) == {"b": (2, 3), "d": (None, 4)}
