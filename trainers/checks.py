"""Advice before the first step: each rule is one sentence with its reason. What must not go on is an error."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from adapterhub.base import BaseModel
from adapterhub.errors import ConfigError
from adapterhub.peftdir import pattern_value
from adapterhub.trainers.config import Method, TrainConfig

_MLP = ("gate_proj", "up_proj", "down_proj", "fc1", "fc2", "dense_h_to_4h", "dense_4h_to_h", "gate_up_proj", "c_fc")


@dataclass(frozen=True)
class Facts:
    """What the rules look at."""

    trained_tokens: int
    lora_parameters: int
    expected_rate: float
    max_positions: int | None = None
    good: int = 0  # answers to give, and not to give, of rl: kto
    bad: int = 0
    text_beside_a_template: bool = False  # plain text is compared, and the base is asked through a chat template


# Of the rate for supervised training. Preferences are learnt with far less: Tinker takes 1e-5 for DPO at 8 billion
# parameters, where it takes 2.9e-4. Most of ORPO's loss is the likelihood, as in supervised training.
_RATES: Mapping[Method | None, float] = {
    None: 1,
    "dpo": 1 / 20,
    "ipo": 1 / 20,
    "kto": 1 / 20,
    "simpo": 1 / 20,
    "orpo": 1 / 5,
}


def learning_rate(base_config: Mapping[str, Any], method: Method | None = None) -> float:
    """A good rate for LoRA with alpha 32, independent of the rank: 5e-4 · (2000 / width)^p, less for preferences.

    Source: Thinking Machines, "LoRA Without Regret", as Tinker ships it: p = 0.781 for Llama, 0.0775 for Qwen;
    2e-4 for other families.
    """
    share = _RATES[method]
    config = base_config.get("text_config") or base_config
    width, family = config.get("hidden_size"), str(config.get("model_type", ""))
    power = 0.781 if family.startswith(("llama", "mistral")) else 0.0775 if family.startswith("qwen") else None
    if not width or power is None:
        return 2e-4 * share
    return float(f"{5e-4 * (2000 / width) ** power * share:.2g}")


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
    elif targets != "all-linear":
        found = {k: v for k, v in layers.items() if re.fullmatch(targets, k)}
        if layers and not found:
            raise ConfigError(
                f"lora_target_modules: no layer of the base {base.name} matches {targets!a}",
                why=f"a layer's whole name is matched, like {next(iter(layers))}",
                hint="use lora_target_linear: true, or a list of names",
            )
        layers = found
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
    factors: int = sum(pattern_value(pattern, name, config.lora_r) * sum(shape) for name, shape in layers.items())
    return factors + sum(shape[0] for shape in layers.values()) * config.peft_use_dora  # DoRA's magnitudes


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
    if facts.text_beside_a_template:
        advice.append(
            "the answers are compared as plain text, and this base is asked through a chat template: "
            "type: chat_template writes the rows with it"
        )
    advice += _balance(config, facts)
    if config.rl is None and facts.lora_parameters < facts.trained_tokens:
        advice.append(
            f"rank {config.lora_r} gives {facts.lora_parameters:,} parameters for {facts.trained_tokens:,} trained "
            "tokens; LoRA keeps up with full training while it has at least as many: raise lora_r"
        )
    advice += _rate(config.learning_rate, facts.expected_rate)
    if facts.max_positions and config.sequence_len > facts.max_positions:
        advice.append(
            f"sequence_len {config.sequence_len} is beyond the base's {facts.max_positions} positions, "
            f"rows are cut there"
        )
    return advice


def _balance(config: TrainConfig, facts: Facts) -> list[str]:
    """KTO wants good answers to weigh 1 to 4/3 times as much as bad ones (arXiv:2402.01306, section 4.2)."""
    if not facts.good or not facts.bad:
        missing = "good" if facts.bad else "bad"
        return [f"no answer is {missing}: KTO learns from both"] if facts.good + facts.bad else []
    share = facts.good * config.kto_desirable_weight / (facts.bad * config.kto_undesirable_weight)
    if 0.9 <= share <= 1.5:
        return []
    weight = facts.bad * config.kto_undesirable_weight / facts.good
    return [
        f"{facts.good:,} good answers weigh {share:.2g} times as much as {facts.bad:,} bad ones; KTO's authors take 1 "
        f"to 1.33: kto_desirable_weight: {weight:.2g}"
    ]


def _rate(rate: float | None, expected: float) -> list[str]:
    if rate and rate <= expected / 10:
        return [
            f"learning_rate {rate:g} is far below what suits LoRA on this base, about {expected:g}: whole models are "
            "trained with such a rate, and an adapter hardly moves"
        ]
    if rate and rate > expected * 10:
        return [
            f"learning_rate {rate:g} is far above what suits LoRA on this base, about {expected:g}: the loss may rise"
        ]
    return []
