"""RMS norms on CPU by vLLM's own C++ kernels, which vLLM 0.32 has and leaves aside for torch operations one by one.

With LoRA nothing is compiled on a CPU, so that one norm of 8 tokens costs 20 µs where it could cost 6, twice in each
layer (decision record 0026). The kernels are added as one more provider of vLLM's operators: what a person says with
``--ir-op-priority`` comes first, and what the kernels do not take falls to vLLM's own.
"""

from __future__ import annotations

from typing import Any

import torch
from vllm import ir
from vllm.config.kernel import IrOpPriorityConfig
from vllm.platforms import current_platform
from vllm.platforms.interface import Platform

PROVIDER = "adapterhub"
WIDTH = 32  # the kernels take whole vectors of 16 or 32 elements


def install() -> None:
    """Prefer them where vLLM would take torch's operations on a CPU. May be called any number of times."""
    platform = type(current_platform)
    if not current_platform.is_cpu() or "get_default_ir_op_priority" in vars(platform):
        return  # it has a preference of its own
    current_platform.import_kernels()
    if not all(hasattr(torch.ops._C, name) for name in ("rms_norm", "fused_add_rms_norm")):
        return
    _register()
    platform.get_default_ir_op_priority = classmethod(_priority)


def _priority(platform: type[Platform], config: Any) -> IrOpPriorityConfig:
    ours = [PROVIDER, "native"]
    return IrOpPriorityConfig.with_default(["native"], rms_norm=[*ours], fused_add_rms_norm=[*ours])


def _register() -> None:
    if PROVIDER not in ir.ops.rms_norm.impls:
        ir.ops.rms_norm.register_impl(PROVIDER, supports_args=_takes)(rms_norm)
        ir.ops.fused_add_rms_norm.register_impl(PROVIDER, supports_args=_takes_sum, inplace=True)(fused_add_rms_norm)


def _takes(x: torch.Tensor, weight: torch.Tensor | None, epsilon: float, variance_size: int | None = None) -> bool:
    """Whether the kernel computes this: every tensor of one dtype, without gaps, normed over its whole last axis."""
    return (
        variance_size is None
        and weight is not None
        and weight.dtype == x.dtype
        and x.shape[-1] % WIDTH == 0
        and x.is_contiguous()
    )


def _takes_sum(
    x: torch.Tensor,
    x_residual: torch.Tensor,
    weight: torch.Tensor | None,
    epsilon: float,
    variance_size: int | None = None,
) -> bool:
    return _takes(x, weight, epsilon, variance_size) and x_residual.dtype == x.dtype and x_residual.is_contiguous()


def rms_norm(
    x: torch.Tensor, weight: torch.Tensor | None, epsilon: float, variance_size: int | None = None
) -> torch.Tensor:
    out = torch.empty_like(x)
    torch.ops._C.rms_norm(out, x, weight, epsilon)
    return out


def fused_add_rms_norm(
    x: torch.Tensor,
    x_residual: torch.Tensor,
    weight: torch.Tensor | None,
    epsilon: float,
    variance_size: int | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """In place: ``x_residual`` += ``x``, and ``x`` becomes the norm of that sum."""
    torch.ops._C.fused_add_rms_norm(x, x_residual, weight, epsilon)
    return x, x_residual
