"""What becomes of a key: one rule for each key whose fate depends on its value, its neighbours or the machine."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from adapterhub.trainers.dialect.fate import Kind, Machine, shown
from adapterhub.trainers.dialect.keys import BITS_ADAM

NOT_ADAPTED = {"lm_head", "embed_tokens", "wte", "embed_out"}
Rule = Callable[[Any, Mapping[str, Any], Machine], tuple[Kind, str]]


def attention(read: Mapping[str, Any], machine: Machine) -> str:
    legacy = {"flash_attention": "flash_attention_2", "sdp_attention": "sdpa", "eager_attention": "eager"}
    legacy["flex_attention"] = "flex_attention"
    wanted = read.get("attn_implementation") or next((v for k, v in legacy.items() if read.get(k)), "sdpa")
    return wanted if machine.gpu or wanted == "eager" else "sdpa"


def _attention_fate(value: Any, read: Mapping[str, Any], machine: Machine) -> tuple[Kind, str]:
    if value is False:
        return "honoured", "off"
    used = attention(read, machine)
    same = (
        machine.gpu or value in ("sdpa", "eager") or (value is True and (read.get("sdp_attention") or used == "eager"))
    )
    return ("honoured", used) if same else ("approximated", "sdpa: the same attention; this machine has no GPU")


def _precision_fate(value: Any, read: Mapping[str, Any], machine: Machine) -> tuple[Kind, str]:
    if value is False:
        return "honoured", "off"
    if machine.gpu:
        return "honoured", shown(value)
    return "approximated", "float32: this machine has no GPU"


def _optimizer_fate(value: Any, read: Mapping[str, Any], machine: Machine) -> tuple[Kind, str]:
    if value in BITS_ADAM and not machine.gpu:
        return "approximated", "AdamW in float32: this machine has no GPU; an adapter's optimizer is small anyway"
    return "honoured", str(value)


def _packing_fate(value: Any, read: Mapping[str, Any], machine: Machine) -> tuple[Kind, str]:
    if value is False:
        return "honoured", "off"
    return "honoured", "rows share up to sequence_len tokens, blind to each other"


def _auto_class_fate(automatic: str) -> Rule:
    def rule(value: Any, read: Mapping[str, Any], machine: Machine) -> tuple[Kind, str]:
        if str(value).startswith(automatic):
            return "honoured", str(value)
        return "without effect", "the class is the one that the base's own config names"

    return rule


def _checkpointing_fate(value: Any, read: Mapping[str, Any], machine: Machine) -> tuple[Kind, str]:
    return ("approximated", "true: without offloading") if value == "offload" else ("honoured", shown(value))


def _warmup_fate(value: Any, read: Mapping[str, Any], machine: Machine) -> tuple[Kind, str]:
    if "warmup_steps" in read:
        return "without effect", "warmup_steps is set"
    return "honoured", shown(value)


def _epochs_fate(value: Any, read: Mapping[str, Any], machine: Machine) -> tuple[Kind, str]:
    return ("without effect", "max_steps is set") if "max_steps" in read else ("honoured", shown(value))


def _targets_fate(value: Any, read: Mapping[str, Any], machine: Machine) -> tuple[Kind, str]:
    if read.get("lora_target_linear"):
        return "honoured", "among all linear layers, which lora_target_linear asks for"
    return "honoured", shown(value)


def _save_fate(value: Any, read: Mapping[str, Any], machine: Machine) -> tuple[Kind, str]:
    if keeps_best(read):
        return "approximated", "checkpoints are made at evaluations, so that the best one is there to be kept"
    return "honoured", shown(value)


def _watchdog_fate(value: Any, read: Mapping[str, Any], machine: Machine) -> tuple[Kind, str]:
    return (
        ("honoured", shown(value)) if "loss_watchdog_threshold" in read else ("without effect", "no threshold is set")
    )


def keeps_best(read: Mapping[str, Any]) -> bool:
    return bool(read.get("load_best_model_at_end") or read.get("early_stopping_patience"))


RULES: Mapping[str, Rule] = {
    **dict.fromkeys(("save_strategy", "save_steps", "saves_per_epoch"), _save_fate),
    "loss_watchdog_patience": _watchdog_fate,
    **dict.fromkeys(
        ("attn_implementation", "flash_attention", "sdp_attention", "eager_attention", "flex_attention"),
        _attention_fate,
    ),
    **dict.fromkeys(("bf16", "fp16", "tf32"), _precision_fate),
    "optimizer": _optimizer_fate,
    "sample_packing": _packing_fate,
    "model_type": _auto_class_fate("AutoModelForCausalLM"),
    "tokenizer_type": _auto_class_fate("AutoTokenizer"),
    "gradient_checkpointing": _checkpointing_fate,
    "warmup_ratio": _warmup_fate,
    "num_epochs": _epochs_fate,
    "lora_target_modules": _targets_fate,
}


def contradictions(read: Mapping[str, Any], sources: Mapping[str, Any]) -> list[tuple[str, str, bool, str]]:
    """Key, the other key, whether they contradict each other, and why."""
    qlora, four = read.get("adapter") == "qlora", bool(read.get("load_in_4bit"))
    both_evals = bool(read.get("val_set_size") and sources["test_datasets"])
    evaluated = bool(read.get("val_set_size") or sources["test_datasets"])
    template = read.get("chat_template", "tokenizer_default")
    regex = isinstance(read.get("lora_target_modules"), str) and not read.get("lora_target_linear")
    return [
        ("adapter", "load_in_4bit", qlora and read.get("load_in_4bit") is False, "QLoRA trains on a 4-bit base"),
        ("load_in_4bit", "adapter", four and not qlora, "a 4-bit base is trained with adapter: qlora"),
        ("peft_layers_to_transform", "lora_target_modules", "peft_layers_to_transform" in read and regex,
         "a regular expression names its layers itself"),
        ("load_in_8bit", "adapter", bool(read.get("load_in_8bit")) and (qlora or four), "8 bit is for adapter: lora"),
        ("val_set_size", "test_datasets", both_evals, "one of the two"),
        ("chat_template_jinja", "chat_template", "chat_template_jinja" in read and template != "jinja",
         "chat_template_jinja is read where chat_template is jinja"),
        ("chat_template", "chat_template_jinja", template == "jinja" and "chat_template_jinja" not in read,
         "chat_template: jinja needs the template in chat_template_jinja"),
        ("bf16", "fp16", read.get("bf16") is True and read.get("fp16") is True, "one of the two"),
        ("eval_steps", "evals_per_epoch", "eval_steps" in read and "evals_per_epoch" in read, "one of the two"),
        ("save_steps", "saves_per_epoch", "save_steps" in read and "saves_per_epoch" in read, "one of the two"),
        ("early_stopping_patience", "val_set_size", "early_stopping_patience" in read and not evaluated,
         "it stops by the evaluation loss: set val_set_size or test_datasets"),
        ("load_best_model_at_end", "val_set_size", bool(read.get("load_best_model_at_end")) and not evaluated,
         "the best is told by the evaluation loss: set val_set_size or test_datasets"),
    ]  # fmt: skip
