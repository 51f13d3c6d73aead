"""Supervised fine-tuning: prepared rows → a LoRA adapter, on transformers, PEFT and TRL's SFTTrainer.

The rows come with ids and labels, so TRL tokenises and masks nothing. On CPU the loss is computed for the trained
positions only (`_trainer_class`): the vocabulary product is a fifth of a small model's work, and most of a chat row
is prompt.
"""

from __future__ import annotations

import json
import logging
import math
import shutil
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from adapterhub.errors import MissingDependency, RunFailed, StorageError
from adapterhub.peftdir import CONFIG, WEIGHTS
from adapterhub.runrecord import ADAPTER
from adapterhub.trainers.config import TrainConfig
from adapterhub.trainers.events import Listener, Stage
from adapterhub.trainers.labels import Example
from adapterhub.trainers.prepare import Prepared
from adapterhub.trainers.quiet import quiet
from adapterhub.trainers.watch import (
    CHECKPOINTS,
    METRICS,
    forget_after,
    mean_loss,
    remove_printers,
    stop_on_signal,
    watch_class,
)

LOG = "train.log"


@dataclass(frozen=True)
class Fitted:
    """What a finished training measured."""

    steps: int
    train_loss: float  # mean over the whole training
    eval_loss: float | None  # after the last step; None without evaluation data
    seconds: float  # of the steps, without loading
    tokens: int  # seen in the steps, padding not counted


def fit(prepared: Prepared, folder: Path, *, on_event: Listener, resume: bool = False) -> Fitted:
    """Train, and write ``folder/adapter``; ``metrics.jsonl``, ``train.log`` and checkpoints on the way.

    Raises:
        Interrupted: Ctrl-C or SIGTERM; a checkpoint is in the folder.
        RunFailed: out of memory, a loss that is no number, or whatever broke below us; the log has it all.
        MissingDependency: the ``train`` extra, or a package that a key asks for, is not installed.
    """
    on_event(Stage("loading torch"))
    with quiet(folder / LOG):
        try:
            return _fit(prepared, folder, on_event, resume)
        except ImportError as error:  # bitsandbytes for QLoRA, an attention kernel
            raise MissingDependency("this training needs a package that is not installed", why=str(error)) from error
        except (RuntimeError, ValueError, TypeError, OSError) as error:
            logging.getLogger(__name__).exception("training broke off")
            raise _wrapped(error, folder) from error


def _fit(prepared: Prepared, folder: Path, on_event: Listener, resume: bool) -> Fitted:
    from peft import LoraConfig
    from transformers import set_seed

    config = prepared.config
    set_seed(config.seed)
    on_event(Stage(f"loading {prepared.base.name}"))
    model = _load_model(prepared)
    targets = config.lora_target_modules
    lora = LoraConfig(
        task_type="CAUSAL_LM",
        r=config.lora_r,
        lora_alpha=config.lora_alpha,
        lora_dropout=config.lora_dropout,
        target_modules=targets if isinstance(targets, str) else list(targets),
        use_rslora=config.peft_use_rslora,
        bias="none",
    )
    watch = watch_class()(folder / METRICS, on_event)
    evaluation = prepared.evaluation.examples if prepared.evaluation else ()
    trainer = _trainer_class()(
        model=model,
        args=_arguments(prepared, folder),
        train_dataset=_dataset(prepared.train.examples),
        eval_dataset=_dataset(evaluation) if evaluation else None,
        processing_class=prepared.tokenizer,
        peft_config=lora,
        callbacks=[watch],
    )
    watch.trainer = trainer
    remove_printers(trainer)
    checkpoint = last_checkpoint(folder) if resume else None
    forget_after(folder / METRICS, int(checkpoint.name.rsplit("-", 1)[-1]) if checkpoint else 0)
    with stop_on_signal(watch):
        result = trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
    seconds = time.monotonic() - watch.began
    watch.raise_if_stopped(folder)
    eval_loss = watch.evals.get(result.global_step)
    if evaluation and eval_loss is None:
        on_event(Stage(f"evaluating {len(evaluation)} rows"))
        eval_loss = float(trainer.evaluate()["eval_loss"])
    _save_adapter(trainer.model, folder, prepared)
    return Fitted(result.global_step, mean_loss(folder / METRICS), eval_loss, seconds, trainer.tokens_seen)


# ── model and arguments ──────────────────────────────────────────────────────────────────────────────────────


def _load_model(prepared: Prepared) -> Any:
    import torch
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    config = prepared.config
    gpu = torch.cuda.is_available()
    dtype = torch.bfloat16 if _bf16(config) else torch.float16 if gpu and config.fp16 is True else torch.float32
    quantisation = None
    if config.load_in_4bit:
        quantisation = BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_use_double_quant=True,
            bnb_4bit_compute_dtype=dtype,
            bnb_4bit_quant_storage=torch.bfloat16 if gpu else torch.uint8,
        )
    model = AutoModelForCausalLM.from_pretrained(
        prepared.base.path,
        dtype=dtype,
        attn_implementation=config.attn_implementation,
        trust_remote_code=config.trust_remote_code,
        quantization_config=quantisation,
    )
    model.config.use_cache = False
    return model


def _bf16(config: TrainConfig) -> bool:
    import torch

    return bool(config.bf16) and torch.cuda.is_available() and torch.cuda.is_bf16_supported()


def _arguments(prepared: Prepared, folder: Path) -> Any:
    import torch
    from trl import SFTConfig

    config = prepared.config
    gpu = torch.cuda.is_available()
    steps = _total_steps(prepared)
    scheduler = config.lr_scheduler
    scheduler_options: dict[str, Any] = {}
    if config.cosine_min_lr_ratio is not None and scheduler == "cosine":
        scheduler, scheduler_options = "cosine_with_min_lr", {"min_lr_rate": config.cosine_min_lr_ratio}
    return SFTConfig(
        output_dir=str(folder / CHECKPOINTS),
        per_device_train_batch_size=config.micro_batch_size,
        per_device_eval_batch_size=config.eval_batch_size,
        gradient_accumulation_steps=config.gradient_accumulation_steps,
        num_train_epochs=config.num_epochs,
        max_steps=config.max_steps or -1,
        learning_rate=config.learning_rate,
        optim=config.optimizer,
        lr_scheduler_type=scheduler,
        lr_scheduler_kwargs=scheduler_options or None,
        warmup_steps=_warmup(config, steps),
        weight_decay=config.weight_decay,
        max_grad_norm=config.max_grad_norm,
        adam_beta1=config.adam_beta1,
        adam_beta2=config.adam_beta2,
        adam_epsilon=config.adam_epsilon,
        neftune_noise_alpha=config.neftune_noise_alpha,
        train_sampling_strategy="group_by_length" if config.group_by_length else "random",
        seed=config.seed,
        data_seed=config.seed,
        use_cpu=not gpu,
        bf16=_bf16(config),
        fp16=gpu and config.fp16 is True,
        tf32=config.tf32 if gpu and config.tf32 else None,
        gradient_checkpointing=config.gradient_checkpointing,
        gradient_checkpointing_kwargs={"use_reentrant": False} if config.gradient_checkpointing else None,
        max_length=None,
        packing=False,
        shuffle_dataset=False,
        logging_steps=config.logging_steps,
        logging_first_step=True,
        logging_nan_inf_filter=False,
        eval_strategy=config.eval_strategy if prepared.evaluation else "no",
        eval_steps=_every(config.eval_steps, config.evals_per_epoch, config.num_epochs),
        save_strategy=config.save_strategy,
        save_steps=_every(config.save_steps, config.saves_per_epoch, config.num_epochs) or 500,
        save_total_limit=config.save_total_limit,
        report_to="none",
        disable_tqdm=True,
        dataloader_pin_memory=gpu,
    )


def _total_steps(prepared: Prepared) -> int:
    config = prepared.config
    batches = math.ceil(len(prepared.train.examples) / config.micro_batch_size)
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


def _dataset(examples: Sequence[Example]) -> Any:
    from datasets import Dataset

    return Dataset.from_dict({"input_ids": [e.input_ids for e in examples], "labels": [e.labels for e in examples]})


# ── trainer and callback ─────────────────────────────────────────────────────────────────────────────────────


def _trainer_class() -> Any:
    import torch
    from trl import SFTTrainer

    class Trainer(SFTTrainer):  # type: ignore[misc]
        """Counts tokens, writes no model cards, and skips the logits that no label asks for on CPU."""

        tokens_seen = 0

        def compute_loss(
            self, model: Any, inputs: Any, return_outputs: bool = False, num_items_in_batch: Any = None
        ) -> Any:
            if model.training:
                self.tokens_seen += int(inputs["attention_mask"].sum())
            if inputs["input_ids"].is_cuda or return_outputs or not self._takes_positions:
                return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
            labels = inputs["labels"][:, 1:]  # the token after each position
            positions = (labels != -100).any(dim=0).nonzero()[:, 0]
            labels = labels[:, positions]
            logits = model(
                input_ids=inputs["input_ids"],
                attention_mask=inputs["attention_mask"],
                use_cache=False,
                logits_to_keep=positions,
            ).logits
            total = torch.nn.functional.cross_entropy(
                logits.float().flatten(0, 1), labels.flatten(), ignore_index=-100, reduction="sum"
            )
            return total / (num_items_in_batch if num_items_in_batch is not None else (labels != -100).sum())

        @property
        def _takes_positions(self) -> bool:
            import inspect

            parameters = inspect.signature(type(self.model.get_base_model()).forward).parameters
            return "logits_to_keep" in parameters

        def create_model_card(self, *args: Any, **kwargs: Any) -> None:
            """The run's report says more."""

    return Trainer


def last_checkpoint(folder: Path) -> Path | None:
    """The newest one that is whole; a killed run may have left half of one."""
    found = sorted((folder / CHECKPOINTS).glob("checkpoint-*"), key=lambda p: int(p.name.rsplit("-", 1)[-1]))
    return next((p for p in reversed(found) if (p / "trainer_state.json").is_file()), None)


# ── what is left behind ──────────────────────────────────────────────────────────────────────────────────────


def _save_adapter(model: Any, folder: Path, prepared: Prepared) -> None:
    """Whole or not at all, and the same bytes for the same training: no path of this machine, sorted names."""
    unfinished, final = folder / (ADAPTER + ".tmp"), folder / ADAPTER
    shutil.rmtree(unfinished, ignore_errors=True)
    model.save_pretrained(str(unfinished))
    (unfinished / "README.md").unlink(missing_ok=True)
    file = unfinished / CONFIG
    config = json.loads(file.read_bytes())
    config["base_model_name_or_path"] = prepared.base.name
    config["revision"] = prepared.base.commit
    if isinstance(config.get("target_modules"), list):
        config["target_modules"] = sorted(config["target_modules"])
    file.write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", encoding="utf-8")
    if prepared.template is not None:
        (unfinished / "chat_template.jinja").write_text(prepared.template, encoding="utf-8")
    (unfinished / WEIGHTS).chmod(0o644)  # safetensors writes for its owner only
    shutil.rmtree(final, ignore_errors=True)
    unfinished.rename(final)


def _wrapped(error: Exception, folder: Path) -> RunFailed | StorageError:
    text = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
    log = folder / LOG
    if "out of memory" in text.lower() or "can't allocate memory" in text.lower():
        return RunFailed(
            "out of memory",
            why=text,
            hint="lower micro_batch_size or sequence_len, or set gradient_checkpointing: true",
        )
    if isinstance(error, OSError) and error.errno is not None:
        return StorageError(f"{error.filename or folder} cannot be written", why=error.strerror or text)
    return RunFailed("the training broke off", why=f"{type(error).__name__}: {text}", hint=f"see {log}")
