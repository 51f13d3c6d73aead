"""The keys: Axolotl's names, what each may hold, and which of them do nothing here.

Every key stands in exactly one table. `KEYS` have a value in `TrainConfig` under the same name; the keys of the other
tables are known but do nothing here (`NO_EFFECT`), belong to later versions (`LATER`), or make adapters that no engine
serves (`UNSERVABLE`). The last two are refused unless they are off (null, false, empty).
"""

from __future__ import annotations

from collections.abc import Mapping

from adapterhub.peftdir import VLLM_MAX_RANK
from adapterhub.trainers.dialect.values import (
    Reader,
    alphas,
    choice,
    flag,
    initial,
    layers,
    losses,
    names,
    number,
    numbers,
    options,
    paths,
    precision,
    ranks,
    roles,
    strategy,
    text,
    texts,
    trackers,
    whole,
    words,
)

ADAM = ("adamw_torch", "adamw_torch_fused")
BITS_ADAM = ("adamw_bnb_8bit", "adamw_8bit", "paged_adamw_8bit", "paged_adamw_32bit", "adamw_torch_8bit")
ATTENTIONS = ("sdpa", "eager", "flash_attention_2", "flash_attention_3", "flex_attention")
SCHEDULERS = (
    "cosine",
    "linear",
    "constant",
    "constant_with_warmup",
    "cosine_with_restarts",
    "polynomial",
    "inverse_sqrt",
)

KEYS: Mapping[str, Reader] = {
    # model
    "base_model": text,
    "model_type": text,
    "tokenizer_type": text,
    "revision_of_model": text,
    "model_revision": text,
    "trust_remote_code": flag,
    "attn_implementation": choice(*ATTENTIONS),
    "flash_attention": flag,
    "sdp_attention": flag,
    "eager_attention": flag,
    "flex_attention": flag,
    "load_in_4bit": flag,
    "load_in_8bit": flag,
    # LoRA
    "adapter": choice("lora", "qlora"),
    "lora_r": whole(1, VLLM_MAX_RANK),
    "lora_alpha": number(above=True),
    "lora_dropout": number(0, 0.99),
    "lora_target_linear": flag,
    "lora_target_modules": texts,
    "peft_use_rslora": flag,
    "peft_use_dora": flag,
    "peft_init_lora_weights": initial,
    "lora_model_dir": text,
    "lora_rank_pattern": ranks,
    "lora_alpha_pattern": alphas,
    "peft_layers_to_transform": layers,
    "loraplus_lr_ratio": number(1.0),
    # preferences
    "rl": choice("dpo", "ipo", "kto", "orpo", "simpo"),
    "rl_beta": number(above=True),
    "rl_adapter_ref_model": flag,
    "dpo_loss_type": losses,
    "dpo_loss_weights": numbers,
    "dpo_label_smoothing": number(0, 0.5),
    "precompute_ref_log_probs": flag,
    "kto_desirable_weight": number(above=True),
    "kto_undesirable_weight": number(above=True),
    "orpo_alpha": number(above=True),
    "simpo_gamma": number(),
    "cpo_alpha": number(),
    # data
    "val_set_size": number(),
    "train_on_inputs": flag,
    "sequence_len": whole(8),
    "excess_length_strategy": choice("drop", "truncate"),
    "shuffle_merged_datasets": flag,
    "sample_packing": flag,
    "group_by_length": flag,
    "chat_template": text,
    "chat_template_jinja": text,
    "special_tokens": names,
    # optimiser
    "micro_batch_size": whole(1),
    "eval_batch_size": whole(1),
    "gradient_accumulation_steps": whole(1),
    "num_epochs": number(above=True),
    "max_steps": whole(1),
    "learning_rate": number(above=True, high=1.0),
    "optimizer": choice(*ADAM, *BITS_ADAM, "adafactor", "sgd"),
    "lr_scheduler": choice(*SCHEDULERS),
    "cosine_min_lr_ratio": number(0, 1),
    "warmup_steps": whole(),
    "warmup_ratio": number(0, 1),
    "weight_decay": number(),
    "max_grad_norm": number(),
    "adam_beta1": number(0, 1),
    "adam_beta2": number(0, 1),
    "adam_epsilon": number(above=True),
    "neftune_noise_alpha": number(),
    # run
    "output_dir": text,
    "seed": whole(),
    "bf16": precision,
    "fp16": precision,
    "tf32": flag,
    "gradient_checkpointing": choice(True, False, "offload"),
    "logging_steps": whole(1),
    "eval_strategy": strategy,
    "eval_steps": number(above=True),
    "evals_per_epoch": whole(1),
    "save_strategy": strategy,
    "save_steps": number(above=True),
    "saves_per_epoch": whole(1),
    "save_total_limit": whole(1),
    "load_best_model_at_end": flag,
    "metric_for_best_model": choice("eval_loss", "loss"),
    "early_stopping_patience": whole(1),
    "loss_watchdog_threshold": number(above=True),
    "loss_watchdog_patience": whole(1),
    # trackers
    "report_to": trackers,
    "use_tensorboard": flag,
    "use_wandb": flag,
    "use_mlflow": flag,
    "use_trackio": flag,
    "wandb_project": text,
    "wandb_entity": text,
    "wandb_name": text,
    "mlflow_tracking_uri": text,
    "mlflow_experiment_name": text,
}

TYPES = (
    "chat_template", "sharegpt", "prompt_completion", "instruction", "question_answer", "alpaca_chat.load_qa",
    "alpaca", "alpaca:chat", "alpaca:chatml", "alpaca:phi", "completion", "input_output", "tokens",
)  # fmt: skip
PREFERENCE_STYLES = ("default", "argilla", "argilla_chat", "icr", "intel", "prompt_pairs", "ultra")
PREFERENCE_TYPES = tuple(
    name for family in ("chat_template", "chatml", "llama3")
    for name in (family, *(f"{family}.{style}" for style in PREFERENCE_STYLES))
)  # fmt: skip

SOURCE_KEYS: Mapping[str, Reader] = {
    "path": text,
    "type": choice(*dict.fromkeys((*TYPES, *PREFERENCE_TYPES))),
    "ds_type": choice("json", "csv", "parquet"),
    "field": text,
    "field_messages": text,
    "field_tools": text,
    "field_system": text,
    "field_instruction": text,
    "field_input": text,
    "field_output": text,
    "field_prompt": text,
    "field_chosen": text,
    "field_rejected": text,
    "field_completion": text,
    "field_label": text,
    "message_property_mappings": names,
    "roles": options,
    "name": text,
    "split": text,
    "data_files": paths,
    "revision": text,
    "roles_to_train": roles,
    "train_on_eos": choice("turn", "all", "last", "none"),
    "message_field_training": text,
    "drop_system_message": flag,
}

USER_FORMAT_KEYS: Mapping[str, Reader] = {
    "field_instruction": text,
    "field_input": text,
    "field_output": text,
    "field_system": text,
    "format": text,
    "no_input_format": text,
    "system_format": words,
    "system_prompt": words,
}

USER_PREFERENCE_KEYS: Mapping[str, Reader] = {
    "field_prompt": text,
    "field_system": text,
    "field_chosen": text,
    "field_rejected": text,
    "field_completion": text,
    "field_label": text,
    "prompt_format": text,
    "chosen_format": text,
    "rejected_format": text,
    "completion_format": text,
}

BLOCK_KEYS: Mapping[str, Reader] = {
    "name": text,
    "task": choice("style", "domain", "reasoning", "full"),
    "channel": text,
    "description": text,
    "labels": names,
    "skip_bad_rows": whole(),
    "allow_unservable": flag,
}

_TRACKERS = "a detail of the tracker's; set it in the tracker's own environment variables"
_KERNELS = "a kernel choice of Axolotl's"
NO_EFFECT: Mapping[str, str] = {
    "dataset_prepared_path": "rows are tokenised in seconds and kept in memory",
    "dataset_processes": "rows are tokenised in one process",
    "dataloader_num_workers": "batches are made in the training process",
    "pad_to_sequence_len": "rows are padded to the longest of their batch, which changes no loss",
    "eval_sample_packing": "evaluation rows are never packed",
    "strict": "keys are always checked",
    "remove_unused_columns": "only token ids and labels reach the trainer",
    "gradient_checkpointing_kwargs": "checkpointing is the non-reentrant kind",
    "resume_from_checkpoint": "go on with: ah train --resume RUN",
    "auto_resume_from_checkpoints": "go on with: ah train --resume RUN",
    "hub_model_id": "an adapter is published with: ah publish RUN",
    "hub_strategy": "an adapter is published with: ah publish RUN",
    "push_to_hub": "an adapter is published with: ah publish RUN",
    "debug": "see ah train --show-labels",
    "plugins": "Axolotl's own plug-ins",
    "xformers_attention": _KERNELS,
}
NO_EFFECT_PREFIXES: Mapping[str, str] = {
    "wandb_": _TRACKERS,
    "mlflow_": _TRACKERS,
    "trackio_": _TRACKERS,
    "comet_": "Comet is not among the trackers; the curves are in report.html and metrics.jsonl",
    "use_comet": "Comet is not among the trackers; the curves are in report.html and metrics.jsonl",
    "liger_": _KERNELS,
    "cut_cross_entropy": _KERNELS,
    "lora_mlp_kernel": _KERNELS,
    "lora_qkv_kernel": _KERNELS,
    "lora_o_kernel": _KERNELS,
    "unsloth_": _KERNELS,
}

LATER: Mapping[str, str] = {
    "lora_target_parameters": "adapters on expert weights",
    "lora_fan_in_fan_out": "transposed layers",
    "peft": "other initial values",
    "loraplus_lr_embedding": "LoRA+ on embeddings, which are not adapted here",
    "bnb_config_kwargs": "other quantisations than nf4, double",
    "model_config": "overrides of the base's config",
    "tokenizer_config": "a tokenizer from elsewhere",
    "eot_tokens": "naming the end of a turn; it is found from the template",
    "default_system_message": "a system message for rows without one; write it into the rows",
    "dataset_exact_deduplication": "dropping rows that are there twice",
    "batch_size": "a global batch size; set micro_batch_size and gradient_accumulation_steps",
    "optim_args": "more optimiser options",
    "deepspeed": "more than one process",
    "fsdp": "more than one process",
    "fsdp_config": "more than one process",
    "fsdp_version": "more than one process",
    "context_parallel_size": "more than one process",
    "tensor_parallel_size": "more than one process",
    "use_ray": "more than one process",
    "ray_num_workers": "more than one process",
}

UNSERVABLE: Mapping[str, str] = {
    "lora_modules_to_save": "the serving engine takes LoRA factors only, no whole modules",
    "tokens": "new tokens need a trained embedding, which the serving engine does not take",
    "peft_trainable_token_indices": "trained token embeddings are not served",
    "lora_bias": "the serving engine takes no biases",
}

SOURCE_LATER = {
    "chat_template": "a template for one data set; name it for the whole config",
    "chat_template_jinja": "a template for one data set; name it for the whole config",
    "train_on_eot": "one end of a turn is found from the template; train_on_eos speaks of it",
}


def known_keys() -> tuple[str, ...]:
    """Every key of the top level that is known, for did-you-mean."""
    return (*KEYS, "datasets", "test_datasets", "adapterhub", *NO_EFFECT, *LATER, *UNSERVABLE)
