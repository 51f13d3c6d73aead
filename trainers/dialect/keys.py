"""The keys: Axolotl's names, what each may hold, and which of them do nothing here.

Every key stands in exactly one table. `KEYS` have a value in `TrainConfig` under the same name; the keys of the other
tables are known but do nothing here (`NO_EFFECT`), are not supported (`UNSUPPORTED`), or make adapters that no engine
serves (`UNSERVABLE`). The last two are refused unless they are off (null, false, empty).
"""

from __future__ import annotations

from collections.abc import Mapping

from adapterhub.peftdir import VLLM_MAX_RANK
from adapterhub.trainers.dialect.noted import NO_EFFECT
from adapterhub.trainers.dialect.sharding import deepspeed, fsdp, fsdp_options
from adapterhub.trainers.dialect.values import (
    Reader,
    alphas,
    checkpointing,
    choice,
    flag,
    initial,
    layers,
    losses,
    names,
    number,
    numbers,
    optimiser_options,
    options,
    paths,
    precision,
    quantisation,
    ranks,
    resources,
    roles,
    strategy,
    targets,
    template,
    text,
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
    "tokenizer_config": text,
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
    "bnb_config_kwargs": quantisation,
    # LoRA
    "adapter": choice("lora", "qlora"),
    "lora_r": whole(1, VLLM_MAX_RANK),
    "lora_alpha": number(above=True),
    "lora_dropout": number(0, 0.99),
    "lora_target_linear": flag,
    "lora_target_modules": targets,
    "lora_fan_in_fan_out": flag,
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
    "dataset_exact_deduplication": flag,
    "sample_packing": flag,
    "group_by_length": flag,
    "chat_template": template,
    "chat_template_jinja": text,
    "special_tokens": names,
    "eot_tokens": paths,
    "default_system_message": text,
    # optimiser
    "batch_size": whole(1),
    "micro_batch_size": whole(1),
    "eval_batch_size": whole(1),
    "gradient_accumulation_steps": whole(1),
    "num_epochs": number(above=True),
    "max_steps": whole(1),
    "learning_rate": number(above=True, high=1.0),
    "optimizer": choice(*ADAM, *BITS_ADAM, "adafactor", "sgd"),
    "optim_args": optimiser_options,
    "lr_scheduler": choice(*SCHEDULERS),
    "lr_scheduler_kwargs": options,
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
    "gradient_checkpointing": choice(True, False, "offload", "offload_disk"),
    "gradient_checkpointing_kwargs": checkpointing,
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
    # more than one process
    "deepspeed": deepspeed,
    "fsdp": fsdp,
    "fsdp_config": fsdp_options,
    "fsdp_version": choice(1, 2),
    "use_ray": flag,
    "ray_num_workers": whole(1),
    "resources_per_worker": resources,
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
    "train_on_eot": choice("turn", "all", "last", "none"),
    "chat_template": template,
    "chat_template_jinja": text,
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
    "num_processes": whole(1),
    "allow_unservable": flag,
}

# Refused unless they are off: what they are for, or what to write instead.
UNSUPPORTED: Mapping[str, str] = {
    "lora_target_parameters": "adapters on expert weights",
    "peft": "other initial values",
    "model_config": "the base is served by its own config.json: change it there, and name that folder as base_model",
    "overrides_of_model_kwargs": "the base is loaded as it is served",
    "added_tokens_overrides": "the tokenizer is the base's own; change it there, and name that folder as base_model",
    "resume_from_checkpoint": "a run goes on with: ah train --resume RUN",
    "context_parallel_size": "one sequence over several devices",
    "tensor_parallel_size": "one layer over several devices",
    "dp_shard_size": "a mesh of devices; see fsdp and deepspeed",
    "dp_replicate_size": "a mesh of devices; see fsdp and deepspeed",
    "sequence_parallel_degree": "one sequence over several devices",
    "chat_template_kwargs": "a template with switches; write chat_template: jinja with the switch set",
    "chat_template_args": "a template with switches; write chat_template: jinja with the switch set",
    "pretraining_dataset": "pretraining; datasets with type: completion train on running text",
    "streaming": "data that is not checked whole before the first step",
    "min_sample_len": "dropping short rows; leave them out of the data",
    "dataset_shard_num": "a part of the data; take split: train[:10%]",
    "dataset_shard_idx": "a part of the data; take split: train[:10%]",
    "curriculum_sampling": "rows in their order; shuffle_merged_datasets is about the order of the data",
    "eval_sequence_len": "another length for evaluation; sequence_len is for both",
    "s2_attention": "shifted sparse attention, which is not how it is served",
    "unfrozen_parameters": "training weights of the base",
    "lisa_n_layers": "training weights of the base",
    "relora": "ReLoRA, which merges while it trains",
    "relora_steps": "ReLoRA, which merges while it trains",
    "optim_target_modules": "GaLore, which trains the base itself",
    "embedding_lr": "another rate for embeddings, which are not adapted here",
    "embedding_lr_scale": "another rate for embeddings, which are not adapted here",
    "lr_groups": "rates by module; loraplus_lr_ratio is for B",
    "cosine_constant_lr_ratio": "a cosine that ends flat; cosine_min_lr_ratio keeps a rest of the rate",
    "lr_quadratic_warmup": "a quadratic warm-up; warmup_steps is linear",
    "lr_div_factor": "one-cycle schedules",
    "adam_beta3": "CAME; the optimizers are listed in docs/training.md",
    "adam_epsilon2": "CAME; the optimizers are listed in docs/training.md",
    "reward_model": "reward models",
    "process_reward_model": "reward models",
    "num_labels": "reward models",
    "trl": "learning from generated answers (GRPO); rl: dpo, ipo, kto, orpo and simpo learn from given ones",
    "vllm": "learning from generated answers (GRPO)",
    "qat": "training for a quantised base; QLoRA is adapter: qlora",
    "quantization": "quantising after training: ah export",
    "gptq": "a GPTQ base; adapter: qlora quantises any base",
    "llama4_linearized_experts": "adapters on expert weights",
    "quantize_moe_experts": "quantised expert weights",
    "tokenizer_use_mistral_common": "Mistral's own tokenizer library; the base's tokenizer.json is used",
}

UNSERVABLE: Mapping[str, str] = {
    "lora_modules_to_save": "the serving engine takes LoRA factors only, no whole modules",
    "tokens": "new tokens need a trained embedding, which the serving engine does not take",
    "peft_trainable_token_indices": "trained token embeddings are not served",
    "lora_bias": "the serving engine takes no biases",
}

SOURCE_UNSUPPORTED: Mapping[str, str] = {
    "shards": "a part of the data; take split: train[:10%]",
    "shards_idx": "a part of the data; take split: train[:10%]",
    "preprocess_shards": "a part of the data; take split: train[:10%]",
    "conversation": "templates by FastChat's names; set chat_template",
    "split_thinking": "thoughts apart from answers; write them as <think>…</think>, or map reasoning_content",
    "field_thinking": "thoughts apart from answers; map reasoning_content in message_property_mappings",
    "template_thinking_key": "thoughts apart from answers; map reasoning_content in message_property_mappings",
    "message_field_training_detail": "training on parts of a message; type: input_output takes a row in pieces",
    "skip": "leaving rows out; take a split",
    "input_format": "the input's place; write type: {format: …}",
    "input_transform": "Axolotl's own code",
}


def known_keys() -> tuple[str, ...]:
    """Every key of the top level that is known, for did-you-mean."""
    return (*KEYS, "datasets", "test_datasets", "adapterhub", *NO_EFFECT, *UNSUPPORTED, *UNSERVABLE)
