"""ORPO and SimPO: pairs of labelled answers → a trainer that needs no reference, and so one forward pass.

TRL has both under `experimental`, where they may vanish with a release, and its ORPO takes the likelihood of the prompt
as well; the losses are two lines each (docs/decisions/0034).
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import Any

from adapterhub.trainers.config import TrainConfig
from adapterhub.trainers.labels.examples import IGNORED
from adapterhub.trainers.methods.behaviour import Behaviour
from adapterhub.trainers.methods.losses import orpo_loss, simpo_loss
from adapterhub.trainers.methods.preference import collator, pair_rows
from adapterhub.trainers.model import new_adapter
from adapterhub.trainers.prepare import Prepared

SIMPO_BETA = 2.0  # arXiv:2405.14734, section 3


def reference_free_trainer(
    prepared: Prepared, *, model: Any, arguments: Mapping[str, Any], callbacks: Sequence[Any]
) -> Any:
    """The trainer of ``rl: orpo`` or ``simpo``, not begun."""
    from peft import get_peft_model
    from transformers import TrainingArguments

    config = prepared.config
    adapter = new_adapter(prepared)
    if adapter is not None:
        model = get_peft_model(model, adapter)
    if config.gradient_checkpointing:
        model.enable_input_require_grads()
    trainer = _trainer_class()(
        config,
        model=model,
        args=TrainingArguments(**arguments, remove_unused_columns=False),
        train_dataset=pair_rows(prepared.train),
        eval_dataset=pair_rows(prepared.evaluation) if prepared.evaluation else None,
        data_collator=collator(pad=prepared.tokenizer.pad_token_id, kind="pairs"),
        processing_class=prepared.tokenizer,
        callbacks=list(callbacks),
    )
    trainer.loraplus_lr_ratio = config.loraplus_lr_ratio
    return trainer


def mean_log_probabilities(model: Any, batch: Mapping[str, Any], *, trained_only: bool) -> Any:
    """Of a token of each answer, of shape (answers,).

    Args:
        trained_only: make logits where an answer stands and nowhere else; not every base can.
    """
    import torch

    labels = batch["labels"][:, 1:]  # the token after each position
    positions = (labels != IGNORED).any(dim=0).nonzero()[:, 0]
    only = {"logits_to_keep": positions} if trained_only else {}
    labels = labels[:, positions]
    inputs = {key: batch[key] for key in ("input_ids", "attention_mask")}
    logits = model(**inputs, use_cache=False, **only).logits
    logits = logits if trained_only else logits[:, positions]
    flat = torch.nn.functional.cross_entropy(
        logits.float().flatten(0, 1), labels.flatten(), ignore_index=IGNORED, reduction="none"
    )
    return -flat.view_as(labels).sum(dim=1) / (labels != IGNORED).sum(dim=1)


def _trainer_class() -> Any:
    import torch
    from transformers import Trainer as Plain

    class Trainer(Behaviour, Plain):  # type: ignore[misc]
        loss_is_scaled_for_ga = False

        def __init__(self, config: TrainConfig, **options: Any) -> None:
            super().__init__(**options)
            self.config = config
            self.rewards: dict[str, list[float]] = defaultdict(list)

        def compute_loss(
            self, model: Any, inputs: Any, return_outputs: bool = False, num_items_in_batch: Any = None
        ) -> Any:
            if model.training:
                self.tokens_seen += int(inputs["attention_mask"].sum())
            chosen, rejected = mean_log_probabilities(model, inputs, trained_only=self.takes_positions).chunk(2)
            if self.config.rl == "orpo":
                weight = self.config.orpo_alpha
                losses = orpo_loss(chosen, rejected, weight=weight)
            else:
                weight = SIMPO_BETA if self.config.rl_beta is None else self.config.rl_beta
                losses = simpo_loss(
                    chosen, rejected, beta=weight, gamma=self.config.simpo_gamma, likelihood=self.config.cpo_alpha
                )
            margins = weight * (chosen - rejected).detach()
            self.rewards["rewards/margins"].append(float(margins.mean()))
            self.rewards["rewards/accuracies"].append(float((margins > 0).float().mean()))
            return (losses.mean(), {}) if return_outputs else losses.mean()

        def prediction_step(
            self, model: Any, inputs: Any, prediction_loss_only: bool, ignore_keys: Any = None
        ) -> tuple[Any, None, None]:
            with torch.no_grad(), self.compute_loss_context_manager():
                return self.compute_loss(model, self._prepare_inputs(inputs)).detach(), None, None

        def evaluate(self, *args: Any, **kwargs: Any) -> Any:
            kept, self.rewards = self.rewards, defaultdict(list)  # of the steps since the last log line
            try:
                return super().evaluate(*args, **kwargs)
            finally:
                self.rewards = kept

        def log(self, logs: dict[str, float], *args: Any) -> None:
            prefix = "eval_" if "eval_loss" in logs else ""
            if prefix or "loss" in logs:
                logs |= {prefix + name: sum(values) / len(values) for name, values in self.rewards.items()}
                self.rewards.clear()
            super().log(logs, *args)

    return Trainer
