"""Our config in transformers' words."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

from adapterhub.trainers.config import TrainConfig
from adapterhub.trainers.methods.packing import packs
from adapterhub.trainers.model import in_bfloat16
from adapterhub.trainers.prepare import Prepared
from adapterhub.trainers.processes import Place
from adapterhub.trainers.sharding import sharding
from adapterhub.trainers.watch import CHECKPOINTS


def arguments(prepared: Prepared, folder: Path) -> dict[str, Any]:
    """Keyword arguments that transformers' TrainingArguments and all of TRL's configs take."""
    import torch

    config = prepared.config
    gpu = torch.cuda.is_available()
    steps = total_steps(prepared)
    scheduler = config.lr_scheduler
    scheduler_options = dict(config.lr_scheduler_kwargs)
    if config.cosine_min_lr_ratio is not None and scheduler == "cosine":
        scheduler = "cosine_with_min_lr"
        scheduler_options["min_lr_rate"] = config.cosine_min_lr_ratio
    return {
        "output_dir": str(folder / CHECKPOINTS),
        "per_device_train_batch_size": config.micro_batch_size,
        "per_device_eval_batch_size": config.eval_batch_size,
        "gradient_accumulation_steps": config.gradient_accumulation_steps,
        "num_train_epochs": config.num_epochs,
        "max_steps": config.max_steps or -1,
        "learning_rate": config.learning_rate,
        "optim": config.optimizer,
        "optim_args": ",".join(f"{key}={value}" for key, value in config.optim_args.items()) or None,
        "lr_scheduler_type": scheduler,
        "lr_scheduler_kwargs": scheduler_options or None,
        "warmup_steps": _warmup(config, steps),
        "weight_decay": config.weight_decay,
        "max_grad_norm": config.max_grad_norm,
        "adam_beta1": config.adam_beta1,
        "adam_beta2": config.adam_beta2,
        "adam_epsilon": config.adam_epsilon,
        "neftune_noise_alpha": config.neftune_noise_alpha,
        "train_sampling_strategy": "group_by_length" if config.group_by_length else "random",
        "seed": config.seed,
        "data_seed": config.seed,
        "use_cpu": not gpu,
        "bf16": in_bfloat16(config),
        "fp16": gpu and config.fp16 is True,
        "tf32": config.tf32 if gpu and config.tf32 else None,
        "gradient_checkpointing": config.gradient_checkpointing,
        "gradient_checkpointing_kwargs": (
            {"use_reentrant": False} | dict(config.gradient_checkpointing_kwargs)
            if config.gradient_checkpointing
            else None
        ),
        "logging_steps": config.logging_steps,
        "logging_first_step": True,
        "logging_nan_inf_filter": False,
        "eval_strategy": config.eval_strategy if prepared.evaluation else "no",
        "eval_steps": _every(config.eval_steps, config.evals_per_epoch, config.num_epochs),
        "save_strategy": config.save_strategy,
        "save_steps": _every(config.save_steps, config.saves_per_epoch, config.num_epochs) or 500,
        "save_total_limit": config.save_total_limit,
        "load_best_model_at_end": config.load_best_model_at_end,
        "metric_for_best_model": "eval_loss" if config.load_best_model_at_end else None,
        "report_to": list(config.report_to) or "none",
        "run_name": config.wandb_name or folder.name,
        "disable_tqdm": True,
        "dataloader_pin_memory": gpu,
        **sharding(config, gpu=gpu),
    }


def total_steps(prepared: Prepared) -> int:
    config, world = prepared.config, Place.here().world
    rows = prepared.train.rows
    if config.sample_packing:
        rows = len(packs(prepared.train.examples, capacity=config.sequence_len))
    batches = math.ceil(rows / (config.micro_batch_size * world))
    per_epoch = max(1, math.ceil(batches / config.gradient_accumulation_steps))
    return config.max_steps or math.ceil(config.num_epochs * per_epoch)


def _warmup(config: TrainConfig, steps: int) -> int:
    """Steps of warm-up. Unset means what it means in Axolotl: 3 % of the steps, at most 100."""
    if config.warmup_steps is not None:
        return config.warmup_steps
    if config.warmup_ratio is not None:
        return math.ceil(config.warmup_ratio * steps)
    return min(int(0.03 * steps), 100)


def _every(steps: float | None, per_epoch: int | None, epochs: float) -> float | None:
    """Steps between two events: a number of steps, or a share of the training below 1."""
    if per_epoch:
        return 1 / (per_epoch * epochs)
    return steps if steps is None or steps < 1 else int(steps)
