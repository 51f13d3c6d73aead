"""RMS norms by vLLM's C++ kernels beside vLLM's own in torch."""

from __future__ import annotations

import importlib
import warnings
from types import ModuleType
from typing import Any

import pytest

pytestmark = pytest.mark.slow  # importing vLLM alone takes 10 s


@pytest.fixture
def cpu_norms(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """Installed, and taken back after the test."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # vLLM's own, while it is imported
        module = importlib.import_module("adapterhub.serving.engine.cpu_norms")
        from vllm import ir
        from vllm.platforms import current_platform
    platform = type(current_platform)
    had = vars(platform).get("get_default_ir_op_priority")
    module.install()
    module.install()  # any number of times
    monkeypatch.setattr(ir.ops.rms_norm, "_priority_impls", [])
    monkeypatch.setattr(ir.ops.fused_add_rms_norm, "_priority_impls", [])
    current_platform.get_default_ir_op_priority(None).set_default()
    yield module
    if had is None:
        del platform.get_default_ir_op_priority


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("shape", [(1, 64), (8, 576), (33, 4, 96)], ids=str)
def test_they_are_vllms_own_to_the_last_bits(cpu_norms: ModuleType, dtype: str, shape: tuple[int, ...]) -> None:
    import torch
    from vllm import ir

    kind = getattr(torch, dtype)
    torch.manual_seed(0)
    x, residual, weight = (torch.randn(s).to(kind) for s in (shape, shape, shape[-1:]))
    close: dict[str, Any] = {"rtol": 1e-5, "atol": 1e-5} if dtype == "float32" else {"rtol": 0.02, "atol": 0.02}
    native = ir.ops.rms_norm.impls["native"].impl_fn(x, weight, 1e-5)
    assert ir.ops.rms_norm.dispatch(x, weight, 1e-5).provider == cpu_norms.PROVIDER
    torch.testing.assert_close(ir.ops.rms_norm._inner_call(x, weight, 1e-5), native, **close)

    normed, total = ir.ops.fused_add_rms_norm.impls["native"].impl_fn(x.clone(), residual.clone(), weight, 1e-5)
    got, summed = ir.ops.fused_add_rms_norm.maybe_inplace._inner_call(x.clone(), residual.clone(), weight, 1e-5)
    torch.testing.assert_close(got, normed, **close)
    assert torch.equal(summed, total)


def test_what_the_kernels_do_not_take_is_vllms_own(cpu_norms: ModuleType) -> None:
    import torch
    from vllm import ir

    norm = ir.ops.rms_norm
    x, weight = torch.randn(4, 128), torch.randn(64)
    for values in (
        (x[:, :64], weight, 1e-5),  # rows apart, as q and k of a merged projection
        (x, None, 1e-5),
        (x[:, :64].contiguous(), weight.bfloat16(), 1e-5),
        (torch.randn(4, 40), torch.randn(40), 1e-5),
        (x[:, :64].contiguous(), weight, 1e-5, 32),
    ):
        assert norm.dispatch(*values).provider == "native"
    sums = ir.ops.fused_add_rms_norm
    assert sums.dispatch(torch.randn(4, 64), x[:, :64], weight, 1e-5).provider == "native"


def test_a_platform_with_a_preference_of_its_own_keeps_it(
    cpu_norms: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    from vllm.platforms import current_platform

    own = classmethod(lambda platform, config: "its own")
    monkeypatch.setattr(type(current_platform), "get_default_ir_op_priority", own)
    cpu_norms.install()
    assert current_platform.get_default_ir_op_priority(None) == "its own"
