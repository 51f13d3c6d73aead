"""What becomes of a key: one rule for each key whose fate depends on its value, its neighbours or the machine."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

from adapterhub.peftdir import VLLM_MAX_RANK
from adapterhub.trainers.config import DataSource, UserFormat, UserPreference
from adapterhub.trainers.dialect.columns import unread
from adapterhub.trainers.dialect.fate import Kind, Machine, shown
from adapterhub.trainers.dialect.keys import BITS_ADAM
from adapterhub.trainers.labels import templates

# Keys of one method only, and the methods that read them.
OF_METHOD: Mapping[str, tuple[str, ...]] = {
    "rl_beta": ("dpo", "ipo", "kto", "simpo"),
    "rl_adapter_ref_model": ("dpo", "ipo", "kto"),
    "precompute_ref_log_probs": ("dpo", "ipo", "kto"),
    "dpo_loss_type": ("dpo", "ipo"),
    "dpo_loss_weights": ("dpo", "ipo"),
    "dpo_label_smoothing": ("dpo", "ipo"),
    "kto_desirable_weight": ("kto",),
    "kto_undesirable_weight": ("kto",),
    "orpo_alpha": ("orpo",),
    "simpo_gamma": ("simpo",),
    "cpo_alpha": ("simpo",),
}
CHANGES_THE_BASE = ("pissa", "olora")  # initial values that leave less in the base's own weights
MAX_CONVERTED_RANK = VLLM_MAX_RANK // 2  # of those: the conversion to a plain LoRA doubles the rank
OF_THE_ADAPTER = (
    "lora_r", "lora_alpha", "lora_target_linear", "lora_target_modules", "peft_use_rslora", "peft_use_dora",
    "lora_rank_pattern", "lora_alpha_pattern", "peft_layers_to_transform",
)  # fmt: skip
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


def _of_gpus(otherwise: tuple[Kind, str]) -> Rule:
    """What only a GPU has; ``otherwise`` is what becomes of it elsewhere."""

    def rule(value: Any, read: Mapping[str, Any], machine: Machine) -> tuple[Kind, str]:
        if value is False:
            return "honoured", "off"
        return ("honoured", shown(value)) if machine.gpu else otherwise

    return rule


_precision_fate = _of_gpus(("approximated", "float32: this machine has no GPU"))
_sharding_fate = _of_gpus(("without effect", "it shards a model over GPUs, and this machine has none"))


def _bfloat16_fate(value: Any, read: Mapping[str, Any], machine: Machine) -> tuple[Kind, str]:
    if machine.bf16 and not machine.gpu and value is not False:
        return "honoured", f"{shown(value)}: this CPU multiplies bfloat16"
    return _precision_fate(value, read, machine)


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


def _method_fate(value: Any, read: Mapping[str, Any], machine: Machine) -> tuple[Kind, str]:
    if value == "simpo":
        return "honoured", "simpo, as published: beta 2 and no likelihood term unless rl_beta and cpo_alpha say so"
    if value == "orpo":
        return "honoured", "orpo: the likelihood of the chosen answer, and orpo_alpha times its odds"
    reference = "the adapter that it starts from" if read.get("lora_model_dir") else "the base"
    return "honoured", f"{value}; the reference is {reference}"


def _of_method(key: str) -> Rule:
    def rule(value: Any, read: Mapping[str, Any], machine: Machine) -> tuple[Kind, str]:
        if read.get("rl") not in OF_METHOD[key]:
            return "without effect", "it is for rl: " + ", ".join(OF_METHOD[key])
        if key == "rl_adapter_ref_model" and "lora_model_dir" not in read:
            return "without effect", "without lora_model_dir the reference is the base"
        return "honoured", shown(value)

    return rule


def _own_shape(key: str, otherwise: Rule | None) -> Rule:
    def rule(value: Any, read: Mapping[str, Any], machine: Machine) -> tuple[Kind, str]:
        if "lora_model_dir" in read:
            return "without effect", "the adapter that it starts from has its own"
        return otherwise(value, read, machine) if otherwise else ("honoured", shown(value))

    return rule


def _initial_fate(value: Any, read: Mapping[str, Any], machine: Machine) -> tuple[Kind, str]:
    if "lora_model_dir" in read:
        return "without effect", "it starts from an adapter"
    if changes_the_base(value):
        return "honoured", f"{value}; the adapter is converted to a plain LoRA of twice the rank, which can be served"
    return "honoured", shown(value)


def _dora_fate(value: Any, read: Mapping[str, Any], machine: Machine) -> tuple[Kind, str]:
    return ("honoured", "not servable: for ah export" if value else "off")


def _inputs_fate(value: Any, read: Mapping[str, Any], machine: Machine) -> tuple[Kind, str]:
    if value and "rl" in read:
        return "without effect", "answers to one prompt are compared; the prompt counts in none of them"
    return "honoured", shown(value)


def _dropout_fate(value: Any, read: Mapping[str, Any], machine: Machine) -> tuple[Kind, str]:
    if value and "rl" in read:
        return "without effect", "answers are compared without dropout: its noise would be compared too"
    return "honoured", shown(value)


def _order_fate(value: Any, read: Mapping[str, Any], machine: Machine) -> tuple[Kind, str]:
    if value and read.get("rl") == "kto":
        return "without effect", "KTO takes the rows in their order: each is compared with its neighbour's answer"
    return "honoured", shown(value)


def changes_the_base(initial: Any) -> bool:
    """Whether PEFT takes the initial B·A out of the base's weights."""
    return isinstance(initial, str) and initial.startswith(CHANGES_THE_BASE)


def _template_fate(value: Any, read: Mapping[str, Any], machine: Machine) -> tuple[Kind, str]:
    name = str(value).removeprefix(templates.FALLBACK)
    if name in templates.OWN:
        return "approximated", "the base's own tokenizer has it: models of that family carry their template"
    if name in templates.NAMED:
        return "honoured", f"{value}; it travels with the adapter, and serving renders with it"
    return "honoured", shown(value)


def _checkpointing_options_fate(value: Any, read: Mapping[str, Any], machine: Machine) -> tuple[Kind, str]:
    if not read.get("gradient_checkpointing"):
        return "without effect", "gradient_checkpointing is off"
    return "honoured", shown(value)


def _bits_fate(value: Any, read: Mapping[str, Any], machine: Machine) -> tuple[Kind, str]:
    if not (read.get("load_in_8bit") or read.get("adapter") == "qlora"):
        return "without effect", "the base is not quantised"
    return "honoured", shown(value)


def _batch_fate(value: Any, read: Mapping[str, Any], machine: Machine) -> tuple[Kind, str]:
    micro = read.get("micro_batch_size", 1)
    return "honoured", f"{value}: gradient_accumulation_steps is {max(1, value // micro)}"


def _ray_fate(value: Any, read: Mapping[str, Any], machine: Machine) -> tuple[Kind, str]:
    return ("honoured", shown(value)) if "use_ray" in read else ("without effect", "use_ray is not set")


def _evaluated_fate(value: Any, read: Mapping[str, Any], machine: Machine) -> tuple[Kind, str]:
    if value not in (False, "no") and not (read.get("val_set_size") or read.get("test_datasets")):
        return "without effect", "there is nothing to evaluate on: set val_set_size or test_datasets"
    return "honoured", shown(value)


def _best_fate(value: Any, read: Mapping[str, Any], machine: Machine) -> tuple[Kind, str]:
    return ("honoured", shown(value)) if keeps_best(read) else ("without effect", "load_best_model_at_end is not set")


def _mlflow_fate(value: Any, read: Mapping[str, Any], machine: Machine) -> tuple[Kind, str]:
    on = read.get("use_mlflow") or "mlflow" in read.get("report_to", ())
    return ("honoured", shown(value)) if on else ("without effect", "use_mlflow is not set")


def _wandb_fate(value: Any, read: Mapping[str, Any], machine: Machine) -> tuple[Kind, str]:
    asked = read.get("use_wandb") or "wandb" in read.get("report_to", ()) or "wandb_project" in read
    on = asked and read.get("use_wandb") is not False
    return ("honoured", shown(value)) if on else ("without effect", "neither use_wandb nor wandb_project is set")


def source_fate(key: str, value: Any, read: Mapping[str, Any], *, rl: bool) -> tuple[Kind, str]:
    """What becomes of a key of one data set."""
    if why := unread(key, read.get("type"), rl=rl):
        return "without effect", why
    if key == "type" and value == "sharegpt":
        return "honoured", "dropped by Axolotl; taken as conversations of from and value"
    if key in ("train_on_eos", "train_on_eot") and value == "none":
        return "honoured", "none: what is trained so does not learn to stop"
    if key == "train_on_eos" and "train_on_eot" in read:
        return "without effect", "train_on_eot is set, and a turn has one end"
    return "honoured", "your format" if isinstance(value, UserFormat | UserPreference) else shown(value)


def templates_of(sources: Iterable[DataSource]) -> list[tuple[str, str | None]]:
    """The templates that data sets name for themselves, each once, with the text of ``jinja``.

    Axolotl's preference types name one too: ``llama3.ultra`` is a row in the template of Llama 3.
    """
    found = []
    for source in sources:
        family = source.type.split(".")[0] if isinstance(source.type, str) else ""
        if source.chat_template or source.chat_template_jinja:
            found.append((source.chat_template or templates.JINJA, source.chat_template_jinja))
        elif family in ("llama3", "chatml"):
            found.append((family, None))
    return list(dict.fromkeys(found))


def keeps_best(read: Mapping[str, Any]) -> bool:
    return bool(read.get("load_best_model_at_end") or read.get("early_stopping_patience"))


RULES: Mapping[str, Rule] = {
    **dict.fromkeys(("save_strategy", "save_steps", "saves_per_epoch"), _save_fate),
    "loss_watchdog_patience": _watchdog_fate,
    **dict.fromkeys(
        ("attn_implementation", "flash_attention", "sdp_attention", "eager_attention", "flex_attention"),
        _attention_fate,
    ),
    "bf16": _bfloat16_fate,
    **dict.fromkeys(("fp16", "tf32"), _precision_fate),
    "optimizer": _optimizer_fate,
    "sample_packing": _packing_fate,
    "model_type": _auto_class_fate("AutoModelForCausalLM"),
    "tokenizer_type": _auto_class_fate("AutoTokenizer"),
    "gradient_checkpointing": _checkpointing_fate,
    "warmup_ratio": _warmup_fate,
    "num_epochs": _epochs_fate,
    "rl": _method_fate,
    **{key: _of_method(key) for key in OF_METHOD},
    **{key: _own_shape(key, None) for key in OF_THE_ADAPTER},
    "lora_target_modules": _own_shape("lora_target_modules", _targets_fate),
    "peft_use_dora": _own_shape("peft_use_dora", _dora_fate),
    "peft_init_lora_weights": _initial_fate,
    "train_on_inputs": _inputs_fate,
    "lora_dropout": _dropout_fate,
    "group_by_length": _order_fate,
    "chat_template": _template_fate,
    **dict.fromkeys(("eval_strategy", "eval_steps", "evals_per_epoch", "eval_batch_size"), _evaluated_fate),
    "metric_for_best_model": _best_fate,
    **dict.fromkeys(("mlflow_tracking_uri", "mlflow_experiment_name"), _mlflow_fate),
    **dict.fromkeys(("wandb_entity", "wandb_name"), _wandb_fate),
    "gradient_checkpointing_kwargs": _checkpointing_options_fate,
    "bnb_config_kwargs": _bits_fate,
    "batch_size": _batch_fate,
    **dict.fromkeys(("deepspeed", "fsdp", "fsdp_config", "fsdp_version"), _sharding_fate),
    **dict.fromkeys(("ray_num_workers", "resources_per_worker"), _ray_fate),
}


def contradictions(read: Mapping[str, Any], sources: Mapping[str, Any]) -> list[tuple[str, str, bool, str]]:
    """Key, the other key, whether they contradict each other, and why."""
    qlora, four = read.get("adapter") == "qlora", bool(read.get("load_in_4bit"))
    both_evals = bool(read.get("val_set_size") and sources["test_datasets"])
    evaluated = bool(read.get("val_set_size") or sources["test_datasets"])
    template = read.get("chat_template", "tokenizer_default")
    method, losses = read.get("rl"), read.get("dpo_loss_type", ())
    changed = changes_the_base(read.get("peft_init_lora_weights")) and "lora_model_dir" not in read
    regex = isinstance(read.get("lora_target_modules"), str) and not read.get("lora_target_linear")
    micro, whole = read.get("micro_batch_size", 1), read.get("batch_size", 0)
    own = templates_of(sources["datasets"] + sources["test_datasets"])
    top = (template, read.get("chat_template_jinja"))
    return [
        ("chat_template", "datasets", len(own) > 1 or bool(own and "chat_template" in read and own != [top]),
         "an adapter is served with one template, and the data sets name " + " and ".join(name for name, _ in own)),
        ("batch_size", "micro_batch_size", bool(whole % micro), f"{whole} rows are no multiple of {micro}"),
        ("batch_size", "gradient_accumulation_steps", "batch_size" in read and whole != micro
         * read.get("gradient_accumulation_steps", whole // micro), "it is micro_batch_size times as many"),
        ("optim_args", "optimizer", bool(read.get("optim_args")) and read.get("optimizer") != "sgd",
         "only sgd has options; Adam's are adam_beta1, adam_beta2 and adam_epsilon"),
        ("lora_target_linear", "lora_target_modules", read.get("lora_target_linear") is False
         and not read.keys() & {"lora_target_modules", "lora_model_dir"}, "it names no layer: name some"),
        ("deepspeed", "fsdp", bool(read.get("deepspeed") and read.get("fsdp")), "one of the two"),
        ("fsdp", "load_in_8bit", bool(read.get("fsdp") and read.get("load_in_8bit")),
         "an 8-bit base cannot be shared out; take adapter: qlora"),
        ("cosine_min_lr_ratio", "lr_scheduler", "cosine_min_lr_ratio" in read
         and read.get("lr_scheduler", "cosine") != "cosine", "it is for lr_scheduler: cosine"),
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
        ("rl", "sample_packing", method is not None and bool(read.get("sample_packing")),
         "answers that are compared are not packed: take sample_packing out"),
        ("rl", "micro_batch_size", method == "kto" and read.get("micro_batch_size", 1) == 1,
         "KTO measures each row against the answers of the others in its batch: set micro_batch_size to 2 or more, "
         "and gradient_accumulation_steps to as much less"),
        ("dpo_loss_type", "rl", method == "ipo" and losses not in ((), ("ipo",)), "rl: ipo is dpo_loss_type: ipo"),
        ("dpo_loss_weights", "dpo_loss_type", "dpo_loss_weights" in read
         and len(read["dpo_loss_weights"]) != max(1, len(losses)), "one weight for each loss"),
        ("dpo_loss_type", "dpo_label_smoothing", "exo_pair" in losses and not read.get("dpo_label_smoothing"),
         "exo_pair needs dpo_label_smoothing above 0; its authors take 0.001"),
        ("peft_init_lora_weights", "adapter", changed and (qlora or bool(read.get("load_in_8bit"))),
         "it is taken out of the base's weights, and a quantised base is not the one that is served"),
        ("peft_init_lora_weights", "rl", changed and method is not None,
         "the base without the adapter is the reference, and these initial values change it"),
        ("peft_init_lora_weights", "peft_use_dora", changed and bool(read.get("peft_use_dora")), "one of the two"),
        ("peft_init_lora_weights", "lora_r", changed and read.get("lora_r", 0) > MAX_CONVERTED_RANK,
         f"the conversion to a plain LoRA doubles the rank, and the engine takes up to {VLLM_MAX_RANK}"),
        ("peft_init_lora_weights", "lora_rank_pattern", changed and bool(read.get("peft_use_rslora"))
         and bool(read.get("lora_rank_pattern") or read.get("lora_alpha_pattern")),
         "with peft_use_rslora and a pattern it cannot be converted to a plain LoRA"),
        ("bf16", "fp16", read.get("bf16") is True and read.get("fp16") is True, "one of the two"),
        ("eval_steps", "evals_per_epoch", "eval_steps" in read and "evals_per_epoch" in read, "one of the two"),
        ("save_steps", "saves_per_epoch", "save_steps" in read and "saves_per_epoch" in read, "one of the two"),
        ("early_stopping_patience", "val_set_size", "early_stopping_patience" in read and not evaluated,
         "it stops by the evaluation loss: set val_set_size or test_datasets"),
        ("load_best_model_at_end", "val_set_size", bool(read.get("load_best_model_at_end")) and not evaluated,
         "the best is told by the evaluation loss: set val_set_size or test_datasets"),
    ]  # fmt: skip
