"""The keys of DeepSpeed and FSDP: what they may hold, before either library is asked.

Both take options by name and pass over those that they do not know, hours before anybody notices; here they are
checked against what the libraries document.
"""

from __future__ import annotations

import difflib
from collections.abc import Collection, Mapping
from typing import Any

from adapterhub.trainers.dialect.values import reads

FSDP_MODES = (
    "full_shard", "shard_grad_op", "no_shard", "hybrid_shard", "hybrid_shard_zero2", "offload", "auto_wrap",
)  # fmt: skip
_FSDP_CHOICES: Mapping[str, tuple[str, ...]] = {
    "auto_wrap_policy": ("TRANSFORMER_BASED_WRAP", "SIZE_BASED_WRAP", "NO_WRAP"),
    "sharding_strategy": ("FULL_SHARD", "SHARD_GRAD_OP", "NO_SHARD", "HYBRID_SHARD", "HYBRID_SHARD_ZERO2"),
    "state_dict_type": ("FULL_STATE_DICT", "LOCAL_STATE_DICT", "SHARDED_STATE_DICT"),
    "final_state_dict_type": ("FULL_STATE_DICT", "LOCAL_STATE_DICT", "SHARDED_STATE_DICT"),
    "backward_prefetch": ("BACKWARD_PRE", "BACKWARD_POST", "NO_PREFETCH"),
}
_FSDP_FLAGS = (
    "limit_all_gathers", "sync_module_states", "offload_params", "use_orig_params", "cpu_ram_efficient_loading",
    "forward_prefetch", "activation_checkpointing", "reshard_after_forward",
)  # fmt: skip
_FSDP_OTHERS = ("transformer_layer_cls_to_wrap", "min_num_params", "mixed_precision_policy", "version")
_DEEPSPEED = (
    "train_batch_size", "train_micro_batch_size_per_gpu", "gradient_accumulation_steps", "gradient_clipping",
    "optimizer", "scheduler", "fp16", "bf16", "torch_autocast", "amp", "zero_optimization", "seed",
    "zero_allow_untested_optimizer", "zero_force_ds_cpu_optimizer", "communication_data_type", "prescale_gradients",
    "gradient_predivide_factor", "sparse_gradients", "steps_per_print", "wall_clock_breakdown", "dump_state",
    "memory_breakdown", "aio", "activation_checkpointing", "data_types", "checkpoint", "flops_profiler", "tensorboard",
    "wandb", "comet", "csv_monitor", "comms_logger", "autotuning", "compile", "disable_allgather", "tensor_parallel",
)  # fmt: skip


@reads(anyOf=[{"type": "string", "minLength": 1}, {"type": "object"}])
def deepspeed(value: Any) -> str | dict[str, Any]:
    """The name of a JSON file, or what such a file holds."""
    if isinstance(value, str) and value.strip():
        return value
    if not isinstance(value, dict):
        raise ValueError("expects a JSON file, or what one holds: {zero_optimization: {stage: 2}}")
    check_deepspeed(value)
    return dict(value)


def check_deepspeed(config: Mapping[str, Any]) -> None:
    """Raises ValueError for a key that DeepSpeed does not have, or a ZeRO stage that is none."""
    for key in config:
        _known(key, _DEEPSPEED, "DeepSpeed's config")
    zero = config.get("zero_optimization")
    if zero is None:
        return
    stage = zero.get("stage", 0) if isinstance(zero, dict) else None
    if isinstance(stage, bool) or stage not in (0, 1, 2, 3):
        raise ValueError(f"expects zero_optimization with a stage from 0 to 3, it is {zero!a}")


@reads(anyOf=[{"type": "string"}, {"type": "array", "items": {"enum": list(FSDP_MODES)}, "minItems": 1}])
def fsdp(value: Any) -> tuple[str, ...]:
    """``full_shard auto_wrap``, as text or as a list."""
    words = value.replace(",", " ").split() if isinstance(value, str) else value
    if not isinstance(words, list) or not words or any(word not in FSDP_MODES for word in words):
        raise ValueError("expects some of " + ", ".join(FSDP_MODES))
    return tuple(words)


@reads(type="object")
def fsdp_options(value: Any) -> dict[str, Any]:
    """Axolotl writes ``fsdp_`` before each key; both spellings are taken."""
    if not isinstance(value, dict):
        raise ValueError("expects lines like `state_dict_type: FULL_STATE_DICT`")
    found = {str(key).removeprefix("fsdp_"): inner for key, inner in value.items() if inner is not None}
    for key, inner in found.items():
        _known(key, (*_FSDP_CHOICES, *_FSDP_FLAGS, *_FSDP_OTHERS), "fsdp_config")
        if key in _FSDP_CHOICES and inner not in _FSDP_CHOICES[key]:
            raise ValueError(f"expects {key} to be one of {', '.join(_FSDP_CHOICES[key])}")
        if key in _FSDP_FLAGS and not isinstance(inner, bool):
            raise ValueError(f"expects {key} to be true or false")
    return found


def _known(key: str, known: Collection[str], what: str) -> None:
    if key not in known:
        close = difflib.get_close_matches(key, known, n=1, cutoff=0.6)
        raise ValueError(
            f"holds {key!a}, which {what} does not have" + (f"; did you mean {close[0]}?" if close else "")
        )
