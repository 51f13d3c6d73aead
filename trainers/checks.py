"""Advice before the first step: each rule is one sentence with its reason. What must not go on is an error."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from adapterhub.base import BaseModel
from adapterhub.errors import ConfigError
from adapterhub.peftdir import pattern_value
from adapterhub.trainers.config import TrainConfig

_MLP = ("gate_proj", "up_proj", "down_proj", "fc1", "fc2", "dense_h_to_4h", "dense_4h_to_h", "gate_up_proj", "c_fc")


@dataclass(frozen=True)
class Facts:
    """What the rules look at."""

    trained_tokens: int
    lora_parameters: int
    expected_rate: float
    max_positions: int | None = None


def learning_rate(base_config: Mapping[str, Any]) -> float:
    """A good rate for LoRA with alpha 32, independent of the rank: 5e-4 · (2000 / width)^p.

    Source: Thinking Machines, "LoRA Without Regret", as Tinker ships it: p = 0.781 for Llama, 0.0775 for Qwen;
    2e-4 for other families.
    """
    config = base_config.get("text_config") or base_config
    width, family = config.get("hidden_size"), str(config.get("model_type", ""))
    power = 0.781 if family.startswith(("llama", "mistral")) else 0.0775 if family.startswith("qwen") else None
    if not width or power is None:
        return 2e-4
    return float(f"{5e-4 * (2000 / width) ** power:.2g}")


def linear_layers(base: BaseModel) -> tuple[str, ...]:
    """Names of the linear layers in the blocks: down_proj, gate_proj, …"""
    return tuple(sorted({name.rsplit(".", 1)[-1] for name in _blocks(base)}))


def _blocks(base: BaseModel) -> dict[str, tuple[int, ...]]:
    return {
        name.removesuffix(".weight"): tensor.shape
        for name, (_, tensor) in base.tensors.items()
        if name.endswith(".weight") and len(tensor.shape) == 2 and ".layers." in name
    }


def _layer(module: str) -> str:
    return module.split(".layers.")[1].split(".")[0]


def lora_parameters(base: BaseModel, config: TrainConfig) -> int:
    """Elements of all A and B, from the base's headers. Raises ConfigError where no layer would be adapted."""
    layers = _blocks(base)
    targets = config.lora_target_modules
    if isinstance(targets, tuple):
        missing = [t for t in targets if not any(name == t or name.endswith("." + t) for name in layers)]
        if missing and layers:
            known = ", ".join(linear_layers(base))
            raise ConfigError(
                f"lora_target_modules: the base {base.name} has no layer {missing[0]!a}",
                why=f"its linear layers are {known}",
                hint="use lora_target_linear: true",
            )
        layers = {k: v for k, v in layers.items() if any(k == t or k.endswith("." + t) for t in targets)}
    if config.peft_layers_to_transform is not None:
        chosen = {str(i) for i in config.peft_layers_to_transform}
        layers = {k: v for k, v in layers.items() if _layer(k) in chosen}
        absent = chosen - {_layer(k) for k in layers}
        if absent:
            raise ConfigError(
                f"peft_layers_to_transform: the base {base.name} has no layer {min(absent)}",
                why=f"it has {base.config.get('num_hidden_layers', 'fewer')} layers, counted from 0",
            )
    pattern = config.lora_rank_pattern
    return sum(pattern_value(pattern, name, config.lora_r) * sum(shape) for name, shape in layers.items())


def advise(config: TrainConfig, facts: Facts) -> list[str]:
    """Warnings, each with its reason."""
    advice = []
    targets = config.lora_target_modules
    if isinstance(targets, tuple) and config.task in ("domain", "reasoning", "full") and not set(targets) & set(_MLP):
        advice.append(
            f"the MLP layers are left out: task {config.task} learns mostly there; lora_target_linear: true adapts all"
        )
    if config.train_on_inputs:
        advice.append("train_on_inputs: the prompts are learnt too, which seldom helps a chat adapter")
    if facts.lora_parameters < facts.trained_tokens:
        advice.append(
            f"rank {config.lora_r} gives {facts.lora_parameters:,} parameters for {facts.trained_tokens:,} trained "
            "tokens; LoRA keeps up with full training while it has at least as many: raise lora_r"
        )
    rate = config.learning_rate
    if rate and not facts.expected_rate / 10 <= rate <= facts.expected_rate * 10:
        advice.append(f"learning_rate {rate:g} is far from what suits LoRA on this base, about {facts.expected_rate:g}")
    if facts.max_positions and config.sequence_len > facts.max_positions:
        advice.append(
            f"sequence_len {config.sequence_len} is beyond the base's {facts.max_positions} positions, "
            f"rows are cut there"
        )
    return advice
