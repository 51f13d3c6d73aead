"""The training itself: prepared rows → a LoRA adapter, on transformers, PEFT and TRL.

model          the base, loaded, and the LoRA on it, new or gone on from
arguments      our config in transformers' words
sft            the trainer of supervised rows
preference     those of DPO, IPO and KTO      referencefree    that of ORPO and SimPO
adapterdir     what is left behind
"""

from __future__ import annotations

import logging
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from adapterhub.errors import MissingDependency, RunFailed, StorageError
from adapterhub.trainers.adapterdir import save_adapter
from adapterhub.trainers.arguments import arguments
from adapterhub.trainers.config import TrainConfig
from adapterhub.trainers.conversion import keep_initial
from adapterhub.trainers.dialect.rules import changes_the_base
from adapterhub.trainers.events import Listener, Stage
from adapterhub.trainers.methods.preference import preference_trainer
from adapterhub.trainers.methods.referencefree import reference_free_trainer
from adapterhub.trainers.methods.sft import sft_trainer
from adapterhub.trainers.model import keep_precision, load_model, trained_parameters, with_start
from adapterhub.trainers.prepare import Prepared
from adapterhub.trainers.processes import Place, gathered, summed
from adapterhub.trainers.quiet import quiet
from adapterhub.trainers.shortage import is_out_of_memory, out_of_memory
from adapterhub.trainers.trackers import ready_trackers
from adapterhub.trainers.watch import (
    CHECKPOINTS,
    METRICS,
    forget_after,
    mean_loss,
    read_metrics,
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
    evaluation: Mapping[str, float]  # of what became the adapter: eval_loss, and of preferences the rewards; or empty
    seconds: float  # of the steps, without loading
    tokens: int  # seen in the steps, padding not counted

    @property
    def eval_loss(self) -> float | None:
        return self.evaluation.get("eval_loss")


def fit(prepared: Prepared, folder: Path, *, on_event: Listener, resume: bool = False) -> Fitted:
    """Train, and write ``folder/adapter``; ``metrics.jsonl``, ``train.log`` and checkpoints on the way.

    Raises:
        Interrupted: Ctrl-C or SIGTERM; a checkpoint is in the folder.
        OutOfMemory: with the plan's parts and what to lower.
        RunFailed: a loss that is no number, or whatever broke below us; the log has it all.
        MissingDependency: the ``train`` extra, or a package that a key asks for, is not installed.
    """
    ready_trackers(prepared.config, folder)
    on_event(Stage("loading torch"))
    place = Place.here()
    with quiet(folder / (LOG if place.first else f"train.{place.rank}.log")):
        try:
            return _fit(prepared, folder, on_event, resume)
        except ImportError as error:  # bitsandbytes for QLoRA, an attention kernel
            raise MissingDependency("this training needs a package that is not installed", why=str(error)) from error
        except (RuntimeError, ValueError, TypeError, OSError) as error:
            logging.getLogger(__name__).exception("training broke off")
            raise _wrapped(error, prepared, folder) from error


def _fit(prepared: Prepared, folder: Path, on_event: Listener, resume: bool) -> Fitted:
    from transformers import set_seed

    config, place = prepared.config, Place.here()
    set_seed(config.seed)
    on_event(Stage(f"loading {prepared.base.name}"))
    model = with_start(load_model(prepared), prepared)
    before = trained_parameters(model) if prepared.start else {}
    watch = watch_class()(folder / METRICS, on_event, config)
    trainer = trainer_of(config)(
        prepared, model=model, arguments=arguments(prepared, folder), callbacks=_callbacks(watch, config)
    )
    keep_precision(trainer.model, before)
    watch.trainer = trainer
    remove_printers(trainer)
    if changes_the_base(config.peft_init_lora_weights) and place.first:
        keep_initial(trainer.model, folder, resumed=resume)
    checkpoint = last_checkpoint(folder) if resume else None
    if place.first:
        forget_after(folder / METRICS, int(checkpoint.name.rsplit("-", 1)[-1]) if checkpoint else 0)
    with stop_on_signal(watch):
        result = trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
    seconds = time.monotonic() - watch.began
    watch.raise_if_stopped(folder)
    evaluation = _evaluation(trainer, watch, prepared, folder)
    tokens, weights = summed(trainer, trainer.tokens_seen), gathered(trainer)
    if place.first:
        save_adapter(trainer.model, folder, prepared, weights=weights)
    return Fitted(result.global_step, mean_loss(folder / METRICS), evaluation, seconds, tokens)


def trainer_of(config: TrainConfig) -> Any:
    """What makes the trainer of a method."""
    if config.rl is None:
        return sft_trainer
    return reference_free_trainer if config.rl in ("orpo", "simpo") else preference_trainer


def _evaluation(trainer: Any, watch: Any, prepared: Prepared, folder: Path) -> Mapping[str, float]:
    """What was measured of the weights that are kept."""
    if not prepared.evaluation:
        return {}
    # Only the first process has written lines to look it up in.
    best = trainer.state.best_metric if prepared.config.load_best_model_at_end else None
    if best is not None and not Place.here().first:
        return {}
    if best is not None:
        lines = [line for line in read_metrics(folder / METRICS) if line.get("eval_loss") is not None]
        line = min(lines, key=lambda line: abs(line["eval_loss"] - best))
        return {key: value for key, value in line.items() if key.startswith("eval_")}
    last: dict[str, float] | None = watch.evals.get(trainer.state.global_step)
    if last is None:
        watch.on_event(Stage(f"evaluating {prepared.evaluation.rows} rows"))
        trainer.evaluate()
        last = watch.evals[trainer.state.global_step]
    return last


def _callbacks(watch: Any, config: TrainConfig) -> list[Any]:
    from transformers import EarlyStoppingCallback

    if config.early_stopping_patience is None:
        return [watch]
    return [watch, EarlyStoppingCallback(early_stopping_patience=config.early_stopping_patience)]


def last_checkpoint(folder: Path) -> Path | None:
    """The newest one that is whole; a killed run may have left half of one."""
    found = sorted((folder / CHECKPOINTS).glob("checkpoint-*"), key=lambda p: int(p.name.rsplit("-", 1)[-1]))
    return next((p for p in reversed(found) if (p / "trainer_state.json").is_file()), None)


def _wrapped(error: Exception, prepared: Prepared, folder: Path) -> RunFailed | StorageError:
    import torch

    text = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
    log = folder / LOG
    if is_out_of_memory(text):
        return out_of_memory(prepared, text, gpu=torch.cuda.is_available())
    if isinstance(error, OSError) and error.errno is not None:
        return StorageError(f"{error.filename or folder} cannot be written", why=error.strerror or text)
    return RunFailed("the training broke off", why=f"{type(error).__name__}: {text}", hint=f"see {log}")
