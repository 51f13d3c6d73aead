"""The base as it is trained on: loaded in its precision or quantised, and the LoRA that is put on it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from adapterhub.trainers.checks import linear_layers
from adapterhub.trainers.config import TrainConfig
from adapterhub.trainers.methods.behaviour import REFERENCE
from adapterhub.trainers.prepare import Prepared


def load_model(prepared: Prepared) -> Any:
    import torch
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    config = prepared.config
    gpu = torch.cuda.is_available()
    dtype = torch.bfloat16 if in_bfloat16(config) else torch.float16 if gpu and config.fp16 is True else torch.float32
    quantisation = None
    if config.load_in_4bit:
        usual = {
            "bnb_4bit_quant_type": "nf4",
            "bnb_4bit_use_double_quant": True,
            "bnb_4bit_compute_dtype": dtype,
            "bnb_4bit_quant_storage": torch.bfloat16 if gpu else torch.uint8,
        }
        quantisation = BitsAndBytesConfig(load_in_4bit=True, **usual | dict(config.bnb_config_kwargs))
    elif config.load_in_8bit:
        quantisation = BitsAndBytesConfig(load_in_8bit=True, **config.bnb_config_kwargs)
    model = AutoModelForCausalLM.from_pretrained(
        prepared.base.path,
        dtype=dtype,
        attn_implementation=config.attn_implementation,
        trust_remote_code=config.trust_remote_code,
        quantization_config=quantisation,
    )
    model.config.use_cache = False
    return model


def in_bfloat16(config: TrainConfig) -> bool:
    """Weights and products in bfloat16. On a CPU only where the config was read for one that has it: else "auto"."""
    import torch

    if torch.cuda.is_available():
        return bool(config.bf16) and torch.cuda.is_bf16_supported()
    return config.bf16 is True


def with_start(model: Any, prepared: Prepared) -> Any:
    """The base with the adapter that the training goes on from; as it is where it begins a new one."""
    if prepared.start is None:
        return model
    from peft import LoraConfig, PeftModel

    path = str(prepared.start.path)
    description = LoraConfig.from_pretrained(path)
    description.lora_dropout = prepared.config.lora_dropout
    return PeftModel.from_pretrained(model, path, is_trainable=True, config=description)


def keep_precision(model: Any, before: Mapping[str, Any]) -> None:
    """Undo TRL's rounding of the adapter to bfloat16 beside a quantised base that computes in float32.

    Args:
        before: the trained parameters by name, as they were before TRL saw them; of a new adapter none.
    """
    import torch

    quantised = getattr(model, "is_loaded_in_4bit", False) or getattr(model, "is_loaded_in_8bit", False)
    if not quantised or model.get_input_embeddings().weight.dtype != torch.float32:
        return
    for name, parameter in model.named_parameters():
        if "lora_" in name and parameter.dtype == torch.bfloat16:
            source = before.get(name.replace(f".{REFERENCE}.", ".default."))
            parameter.data = parameter.data.float() if source is None else source.clone()


def trained_parameters(model: Any) -> dict[str, Any]:
    """Copies of them, by name."""
    return {n: p.detach().clone() for n, p in model.named_parameters() if p.requires_grad and "lora_" in n}


def new_adapter(prepared: Prepared) -> Any:
    """PEFT's description of the adapter to begin; None where the training goes on from one."""
    if prepared.start is not None:
        return None
    from peft import LoraConfig

    config = prepared.config
    targets, layers = config.lora_target_modules, config.peft_layers_to_transform
    if layers is not None and targets == "all-linear":  # PEFT takes layers only with names
        targets = linear_layers(prepared.base)
    return LoraConfig(
        task_type="CAUSAL_LM",
        r=config.lora_r,
        lora_alpha=config.lora_alpha,
        lora_dropout=config.lora_dropout,
        target_modules=targets if isinstance(targets, str) else list(targets),
        fan_in_fan_out=config.lora_fan_in_fan_out,
        use_rslora=config.peft_use_rslora,
        rank_pattern=dict(config.lora_rank_pattern),
        alpha_pattern=dict(config.lora_alpha_pattern),
        layers_to_transform=None if layers is None else list(layers),
        use_dora=config.peft_use_dora,
        init_lora_weights=config.peft_init_lora_weights,
        bias="none",
    )
