"""Random LoRA configurations on tiny models: what PEFT answers unmerged, and what the exported model answers.

Shared by the test, `tests/export/test_variants.py`, and by `export_equivalence.py`, which runs many more of them.
"""

from __future__ import annotations

import random
import warnings
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from adapterhub.base import find_base
from adapterhub.errors import AdapterHubError
from adapterhub.export import export_model

SHAPE: dict[str, Any] = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "attn_implementation": "eager",
}
LLAMA = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
EXPERTS = {"moe_intermediate_size": 16, "shared_expert_intermediate_size": 24, "num_experts_per_tok": 2}
NEOX = ("query_key_value", "dense", "dense_h_to_4h", "dense_4h_to_h")


@dataclass(frozen=True)
class Kind:
    """One architecture: what its config needs besides, and what can be adapted or saved."""

    linear: tuple[str, ...] = LLAMA
    embedding: str = "embed_tokens"
    norm: str = "norm"
    options: dict[str, Any] = field(default_factory=dict)
    lora: dict[str, Any] = field(default_factory=dict)
    parameters: tuple[str, ...] = ()  # fused experts, and the router


KINDS = {
    "llama": Kind(),
    "qwen2": Kind(),
    "gemma2": Kind(options={"head_dim": 8, "query_pre_attn_scalar": 8}),
    "phi3": Kind(linear=("qkv_proj", "o_proj", "gate_up_proj", "down_proj")),
    "gpt_neox": Kind(linear=NEOX, embedding="embed_in", norm="final_layer_norm"),
    "falcon": Kind(linear=NEOX, embedding="word_embeddings", norm="ln_f", options={"new_decoder_architecture": True}),
    "gpt2": Kind(
        linear=("c_attn", "c_proj", "c_fc"), embedding="wte", norm="ln_f", lora={"fan_in_fan_out": True}
    ),
    "mixtral": Kind(
        linear=LLAMA[:4], options={"num_local_experts": 3}, parameters=("gate_up_proj", "down_proj", "mlp.gate.weight")
    ),
    "qwen2_moe": Kind(
        linear=(*LLAMA[:4], "shared_expert_gate"),
        options={**EXPERTS, "num_experts": 4},
        parameters=("experts.gate_up_proj", "experts.down_proj"),
    ),
    "qwen3_moe": Kind(
        linear=LLAMA[:4],
        options={**EXPERTS, "num_experts": 4, "head_dim": 8},
        parameters=("experts.gate_up_proj", "experts.down_proj", "gate.weight"),
    ),
    "granitemoe": Kind(
        linear=LLAMA[:4],
        options={"num_local_experts": 4, "num_experts_per_tok": 2},
        parameters=("experts.gate_up_proj", "experts.down_proj"),
    ),
    "gpt_oss": Kind(
        linear=LLAMA[:4],
        options={"num_local_experts": 4, "num_experts_per_tok": 2, "head_dim": 8},
        parameters=("gate_up_proj", "down_proj", "experts.gate_up_proj_bias", "router.weight"),
    ),
}  # fmt: skip
BIASED = frozenset({"gpt_neox", "gpt2"})  # all of whose linear layers have a bias


@dataclass(frozen=True)
class Configuration:
    """A base and an adapter on it, before anything is made."""

    kind: str
    lora: dict[str, Any]  # of LoraConfig
    tied: bool = False
    resized: int | None = None  # tokens, where the vocabulary was changed before training
    dtype: str = "float32"  # in which the base is stored
    max_shard_size: int | None = None
    seed: int = 0


@dataclass(frozen=True)
class Outcome:
    """Either how far the exported model's logits are from PEFT's, or why it was not exported."""

    error: float = 0.0
    exact: float = 0.0  # the same with both models computing in float64: what the weights' own rounding leaves
    noise: float = 0.0  # how far PEFT's logits in float32 are from its own in float64
    change: float = 0.0  # what the adapter does to the base's logits
    largest: float = 0.0  # of PEFT's logits, without a sign
    refused: str = ""


def random_configuration(seed: int) -> Configuration:
    pick = random.Random(seed)
    kind = pick.choice(sorted(KINDS))
    about = KINDS[kind]
    targets = pick.sample(about.linear, pick.randint(1, len(about.linear)))
    targets += [end for end in (about.embedding, "lm_head") if pick.random() < 0.2]
    lora: dict[str, Any] = {
        "r": pick.randint(1, 8),
        "lora_alpha": pick.choice([1, 4, 16]),
        "target_modules": targets,
        "use_rslora": pick.random() < 0.3,
        "use_dora": pick.random() < 0.3,
        **about.lora,
    }
    if pick.random() < 0.3:
        lora["rank_pattern"] = {pick.choice(targets): pick.randint(1, 9)}
    if pick.random() < 0.3:
        lora["alpha_pattern"] = {pick.choice([*targets, r".*\.1\..*"]): pick.randint(1, 9)}
    if pick.random() < 0.3:
        lora["bias"] = pick.choice(["all", "lora_only"])
    if pick.random() < 0.2 and not lora["use_dora"] and about.embedding not in targets:
        lora["lora_bias"] = True
    if pick.random() < 0.3:
        rest = [name for name in (about.norm, about.embedding, "lm_head") if name not in targets]
        lora["modules_to_save"] = pick.sample(rest, pick.randint(1, len(rest)))
    if pick.random() < 0.1:
        lora["ensure_weight_tying"] = True
    if pick.random() < 0.1:
        lora["trainable_token_indices"] = pick.choice(
            [[1, 5], {about.embedding: [1, 5], "lm_head": [1, 6, 7]}, {"lm_head": [9]}]
        )
    if about.parameters and pick.random() < 0.7:
        lora |= {"use_dora": False, "lora_bias": False}  # PEFT has neither for parameters
        lora["target_parameters"] = pick.sample(about.parameters, pick.randint(1, len(about.parameters)))
    return Configuration(
        kind=kind,
        lora=lora,
        tied=pick.random() < 0.4,
        resized=pick.choice([60, 70]) if pick.random() < 0.2 else None,
        dtype=pick.choice(["float32", "float32", "bfloat16", "float16"]),
        max_shard_size=20_000 if pick.random() < 0.2 else None,
        seed=seed,
    )


def compare(configuration: Configuration, folder: Path) -> Outcome | None:
    """Make base and adapter in the new ``folder``, export, and compare in float32. None where PEFT itself cannot."""
    from peft import PeftModel

    base, adapter, out = folder / "base", folder / "adapter", folder / "out"
    _write_base(configuration, base)
    try:
        with warnings.catch_warnings(action="ignore"):  # PEFT warns of tied heads and saved embeddings
            _write_adapter(configuration, base, adapter)
            peft = PeftModel.from_pretrained(load(base, configuration.resized), adapter)
            unmerged, exact = logits(peft), logits(peft.double())
    # PEFT says in all these ways that it cannot; nothing of ours has run yet, and such configurations are counted
    except (ValueError, RuntimeError, TypeError, NotImplementedError, KeyError, AttributeError):
        return None
    try:
        export_model(adapter, find_base(str(base)), out, dtype="float32", max_shard_size=configuration.max_shard_size)
    except AdapterHubError as error:
        return Outcome(refused=str(error))
    changed = unmerged - logits(load(base, configuration.resized))
    exported = load(out)
    return Outcome(
        error=float((logits(exported) - unmerged).abs().max()),
        exact=float((logits(exported.double()) - exact).abs().max()),
        noise=float((unmerged - exact).abs().max()),
        change=float(changed.abs().max()),
        largest=float(unmerged.abs().max()),
    )


def load(folder: Path, resized: int | None = None) -> Any:
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, experts_implementation="eager")
    if resized:
        torch.manual_seed(0)
        model.resize_token_embeddings(resized)
    return model


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        found: torch.Tensor = model.eval()(torch.arange(3, 51).view(2, 24)).logits
    return found


def _write_base(configuration: Configuration, folder: Path) -> None:
    from transformers import AutoConfig, AutoModelForCausalLM

    torch.manual_seed(configuration.seed)
    options = {**SHAPE, **KINDS[configuration.kind].options, "tie_word_embeddings": configuration.tied}
    config = AutoConfig.for_model(configuration.kind, **options)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    for name, parameter in model.named_parameters():
        if "bias" in name or "norm" in name or "ln_" in name:  # else zeros and ones, which hide mistakes
            mean = float("weight" in name and configuration.kind != "gemma2")  # Gemma adds the one itself
            torch.nn.init.normal_(parameter, mean=mean, std=0.1)
    model.to(getattr(torch, configuration.dtype)).save_pretrained(folder)


def _write_adapter(configuration: Configuration, base: Path, folder: Path) -> None:
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(configuration.seed + 1)
    model: Any = get_peft_model(
        load(base, configuration.resized),
        LoraConfig(task_type="CAUSAL_LM", init_lora_weights=False, **configuration.lora),
    )
    for name, parameter in model.named_parameters():
        if parameter.requires_grad and "magnitude" not in name:
            if "lora_" in name:
                parameter.data.normal_(std=0.03)  # changes as large as the weights: larger ones only add float32 noise
            else:
                parameter.data.add_(torch.randn_like(parameter) * 0.02)
    for module in model.modules():  # magnitudes near the lengths that training would start from
        for adapter, variant in getattr(module, "lora_variant", {}).items():
            variant.init(module, adapter_name=adapter)
            magnitude = module.lora_magnitude_vector[adapter].weight
            magnitude.data.mul_(torch.rand_like(magnitude) / 2 + 0.75)
    model.save_pretrained(folder)
