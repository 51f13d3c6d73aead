"""What all trainers of ours share, mixed into transformers', TRL's and our own."""

from __future__ import annotations

import inspect
import shutil
from pathlib import Path
from typing import Any

REFERENCE = "ref"  # TRL's name for the frozen copy of the adapter that a training goes on from


class Behaviour:
    """Counts tokens, knows LoRA+, saves the trained adapter alone, writes no model cards, tells nobody."""

    tokens_seen = 0
    loraplus_lr_ratio: float | None = None
    optimizer: Any
    model: Any
    args: Any

    def create_optimizer(self, model: Any = None) -> Any:
        if self.optimizer is None and self.loraplus_lr_ratio is not None:
            from peft.optimizers import create_loraplus_optimizer

            kind, options = self.get_optimizer_cls_and_kwargs(self.args, self.model)  # type: ignore[attr-defined]
            options |= {"weight_decay": self.args.weight_decay}
            self.optimizer = create_loraplus_optimizer(
                self.model, kind, loraplus_lr_ratio=self.loraplus_lr_ratio, **options
            )
        return super().create_optimizer(model) if self.optimizer is None else self.optimizer  # type: ignore[misc]

    def compute_loss(
        self, model: Any, inputs: Any, return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        if model.training:
            self.tokens_seen += int(inputs["attention_mask"].sum())
        return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)  # type: ignore[misc]

    def _save(self, output_dir: str | None = None, state_dict: Any = None) -> None:
        super()._save(output_dir, state_dict)  # type: ignore[misc]
        # Where a checkpoint has adapters in subfolders, transformers loads those and not the trained one beside them;
        # the reference is made again from the adapter that the training began with.
        shutil.rmtree(Path(output_dir or self.args.output_dir) / REFERENCE, ignore_errors=True)

    @property
    def takes_positions(self) -> bool:
        """Whether the base makes logits at some positions only, where it is asked to."""
        parameters = inspect.signature(type(self.model.get_base_model()).forward).parameters
        return "logits_to_keep" in parameters

    def _send_telemetry(self) -> None:
        """TRL tells its makers of each training; ours are nobody's business."""

    def create_model_card(self, *args: Any, **kwargs: Any) -> None:
        """The run's report says more."""
