"""Keys of other programs: those of Axolotl's that do nothing here, and other names of what we have.

`NO_EFFECT` and its prefixes are noted before every run, each with its reason; `ALSO_CALLED` makes an unknown key's
error name the right one.
"""

from __future__ import annotations

from collections.abc import Mapping

_TRACKERS = "a detail of the tracker's; set it in the tracker's own environment variables"
_KERNELS = "a kernel choice of Axolotl's: the same result, by other code"
_COMET = "Comet is not among the trackers; the curves are in report.html and metrics.jsonl"
_TABLES = "metrics are in metrics.jsonl and report.html; answers are scored with: ah eval"
_LOADING = "how rows are prepared changes none of them"
_PUBLISH = "an adapter is published with: ah publish RUN"
_MODELS = "the kind of model is read from the base's own config.json"
_PROCESSES = "a detail of how processes talk to each other"
_TOKENIZER = "the tokenizer is read as its own files say, which is how it is served"

NO_EFFECT: Mapping[str, str] = {
    **dict.fromkeys(
        ("dataset_processes", "dataset_num_proc", "dataset_keep_in_memory", "skip_prepare_dataset",
         "num_dataset_shards_to_save", "dataloader_num_workers", "dataloader_prefetch_factor", "dataloader_pin_memory",
         "push_dataset_to_hub", "sample_packing_bin_size", "sample_packing_group_size", "multipack_real_batches",
         "sample_packing_eff_est", "total_num_tokens", "total_supervised_tokens", "batch_flattening",
         "pretrain_multipack_buffer_size", "pretrain_multipack_attn", "shuffle_before_merging_datasets"),
        _LOADING,
    ),
    **dict.fromkeys(
        ("flash_optimum", "xformers_attention", "flash_attn_cross_entropy", "flash_attn_rms_norm",
         "flash_attn_fuse_qkv", "flash_attn_fuse_mlp", "sage_attention", "tiled_mlp", "tiled_mlp_num_shards",
         "chunked_cross_entropy",
         "chunked_cross_entropy_num_chunks", "use_kernels", "torch_compile", "torch_compile_backend",
         "torch_compile_mode", "flex_attn_compile_kwargs", "gc_steps", "activation_memory_budget", "layer_offloading",
         "embeddings_skip_upcast", "low_cpu_mem_usage", "lora_on_cpu", "use_cache"),
        _KERNELS,
    ),
    **dict.fromkeys(
        ("eval_table_size", "eval_max_new_tokens", "eval_causal_lm_metrics", "do_causal_lm_eval", "do_bench_eval",
         "bench_dataset", "include_tokens_per_second", "include_tkps", "profiler_steps", "profiler_steps_start"),
        _TABLES,
    ),
    **dict.fromkeys(
        ("hub_model_id", "hub_strategy", "hub_revision", "push_to_hub", "hub_private_repo", "merge_lora"), _PUBLISH
    ),
    **dict.fromkeys(
        ("is_falcon_derived_model", "is_llama_derived_model", "is_qwen_derived_model", "is_mistral_derived_model",
         "is_multimodal", "type_of_model", "processor_type", "base_model_config", "base_model_ignore_patterns"),
        _MODELS,
    ),
    **dict.fromkeys(
        ("ddp", "ddp_timeout", "ddp_bucket_cap_mb", "ddp_broadcast_buffers", "ddp_find_unused_parameters", "local_rank",
         "world_size", "device", "device_map", "max_memory", "gpu_memory_limit", "ray_run_name",
         "heads_k_stride", "ring_attn_func"),
        _PROCESSES,
    ),
    **dict.fromkeys(("tokenizer_use_fast", "tokenizer_legacy", "tokenizer_save_jinja_files"), _TOKENIZER),
    **dict.fromkeys(
        ("resize_token_embeddings_to_32x", "mean_resizing_embeddings", "shrink_embeddings"),
        "no token is added, so the embeddings keep their size",
    ),
    "dataset_prepared_path": "rows are tokenised in seconds and kept in memory",
    "pad_to_sequence_len": "rows are padded to the longest of their batch, which changes no loss",
    "eval_sample_packing": "evaluation rows are never packed",
    "strict": "keys are always checked",
    "remove_unused_columns": "only token ids and labels reach the trainer",
    "auto_resume_from_checkpoints": "go on with: ah train --resume RUN",
    "auto_find_batch_size": "where memory runs out: ah train --auto-batch",
    "save_safetensors": "always so",
    "save_only_model": "a checkpoint holds all that going on needs",
    "save_first_step": "the run folder is written before the first step: a full disk shows then",
    "hf_use_auth_token": "log in with: hf auth login",
    "debug": "see ah train --show-labels",
    "plugins": "Axolotl's own plug-ins",
    "loraplus_lr_embedding": "embeddings are not adapted here",
    "logging_dir": "TensorBoard's files are in the run's tensorboard folder",
}  # fmt: skip
NO_EFFECT_PREFIXES: Mapping[str, str] = {
    "wandb_": _TRACKERS,
    "mlflow_": _TRACKERS,
    "trackio_": _TRACKERS,
    "comet_": _COMET,
    "use_comet": _COMET,
    "liger_": _KERNELS,
    "cut_cross_entropy": _KERNELS,
    "lora_mlp_kernel": _KERNELS,
    "lora_qkv_kernel": _KERNELS,
    "lora_o_kernel": _KERNELS,
    "lora_embedding_kernel": _KERNELS,
    "unsloth_": _KERNELS,
    "gradio_": "a page of Axolotl's; ask an adapter with: ah ask",
    "otel_": "telemetry of Axolotl's; nothing is sent from here",
    "swanlab_": "SwanLab is not among the trackers; the curves are in report.html and metrics.jsonl",
    "use_swanlab": "SwanLab is not among the trackers; the curves are in report.html and metrics.jsonl",
    "dft_": "a loss of Axolotl's plug-ins",
}

# What people write who know TRL, transformers, LLaMA-Factory or Unsloth, and older names of Axolotl's → the key here.
ALSO_CALLED: Mapping[str, str] = {
    "model": "base_model",
    "model_name": "base_model",
    "model_name_or_path": "base_model",
    "model_id": "base_model",
    "dataset": "datasets",
    "data": "datasets",
    "train_file": "datasets",
    "eval_dataset": "test_datasets",
    "dataset_name": "datasets",
    "max_length": "sequence_len",
    "max_seq_length": "sequence_len",
    "cutoff_len": "sequence_len",
    "packing": "sample_packing",
    "template": "chat_template",
    "r": "lora_r",
    "rank": "lora_r",
    "lora_rank": "lora_r",
    "alpha": "lora_alpha",
    "target_modules": "lora_target_modules",
    "lora_target": "lora_target_modules",
    "modules_to_save": "lora_modules_to_save",
    "additional_target": "lora_modules_to_save",
    "use_rslora": "peft_use_rslora",
    "use_dora": "peft_use_dora",
    "init_lora_weights": "peft_init_lora_weights",
    "lora_layers_to_transform": "peft_layers_to_transform",
    "layers_to_transform": "peft_layers_to_transform",
    "rank_pattern": "lora_rank_pattern",
    "alpha_pattern": "lora_alpha_pattern",
    "finetuning_type": "adapter",
    "quantization_bit": "load_in_4bit",
    "per_device_train_batch_size": "micro_batch_size",
    "per_device_eval_batch_size": "eval_batch_size",
    "train_batch_size": "micro_batch_size",
    "num_train_epochs": "num_epochs",
    "epochs": "num_epochs",
    "lr": "learning_rate",
    "optim": "optimizer",
    "lr_scheduler_type": "lr_scheduler",
    "eta_min": "cosine_min_lr_ratio",
    "adam_eps": "adam_epsilon",
    "noisy_embedding_alpha": "neftune_noise_alpha",
    "torch_dtype": "bf16",
    "dtype": "bf16",
    "bfloat16": "bf16",
    "float16": "fp16",
    "evaluation_strategy": "eval_strategy",
    "val_size": "val_set_size",
    "test_size": "val_set_size",
    "overrides_of_model_config": "model_config",
    "beta": "rl_beta",
    "dpo_beta": "rl_beta",
    "pref_beta": "rl_beta",
    "pref_loss": "rl",
    "reward_model_type": "rl",
    "ddp_backend": "ddp",
    "num_gpus": "use_ray",
    "output": "output_dir",
}
