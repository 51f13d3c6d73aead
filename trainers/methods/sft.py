"""Supervised fine-tuning: prepared rows → TRL's SFTTrainer.

The rows come with ids and labels, so TRL tokenises and masks nothing. On CPU the loss is computed for the trained
positions only (`_trainer_class`): the vocabulary product is a fifth of a small model's work, and most of a chat row
is prompt. Where the base can, the rows of a batch stand behind each other there, without padding (`blocks`).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from adapterhub.errors import ConfigError
from adapterhub.trainers.labels.examples import Examples
from adapterhub.trainers.methods.behaviour import Behaviour
from adapterhub.trainers.methods.blocks import base_of, takes_blocks, use_blocks
from adapterhub.trainers.methods.packing import collator, packed_row, packs, tokens_in
from adapterhub.trainers.model import new_adapter
from adapterhub.trainers.prepare import Prepared


def sft_trainer(prepared: Prepared, *, model: Any, arguments: Mapping[str, Any], callbacks: Sequence[Any]) -> Any:
    """The trainer, not begun. Raises ConfigError: packed rows would see each other."""
    from trl import SFTConfig

    config, tokenizer = prepared.config, prepared.tokenizer
    if config.sample_packing and base_of(model)._is_stateful:
        raise ConfigError(
            f"sample_packing: the base {prepared.base.name} has a state that runs through all of a row",
            why="rows that share one would see each other",
            hint="take sample_packing out",
        )
    evaluation = prepared.evaluation.examples if prepared.evaluation else None
    packing, pad = config.sample_packing, tokenizer.pad_token_id
    blocks = takes_blocks(model) and (packing or not config.neftune_noise_alpha)  # its noise goes by a row's length
    if blocks:
        use_blocks(model)
    flash = packing and config.attn_implementation.startswith("flash")
    trainer = _trainer_class()(
        model=model,
        args=SFTConfig(**arguments, max_length=None, packing=False, shuffle_dataset=False),
        train_dataset=_packed(prepared) if packing else _dataset(prepared.train.examples, lengths=blocks),
        # With lengths its batches would be flat, and each count once in the mean, however many rows it has.
        eval_dataset=_dataset(evaluation, lengths=flash) if evaluation else None,
        data_collator=collator(pad=pad, flat=blocks or flash) if blocks or packing else None,
        processing_class=tokenizer,
        peft_config=new_adapter(prepared),
        callbacks=list(callbacks),
    )
    trainer.loraplus_lr_ratio = config.loraplus_lr_ratio
    return trainer


def _dataset(examples: Examples, *, lengths: bool = False) -> Any:
    """``lengths``: of each row too, for a flat batch."""
    import pyarrow as pa
    from datasets import Dataset

    more = {"seq_lengths": [[length] for length in examples.lengths]} if lengths else {}
    return Dataset(pa.table(examples.columns() | more))


def _packed(prepared: Prepared) -> Any:
    from datasets import Dataset

    examples = prepared.train.examples
    together = packs(examples, capacity=prepared.config.sequence_len)
    return Dataset.from_list([packed_row([examples[i] for i in places]) for places in together])


def _trainer_class() -> Any:
    import torch
    from trl import SFTTrainer

    class Trainer(Behaviour, SFTTrainer):  # type: ignore[misc]
        """Skips the logits that no label asks for on CPU."""

        def compute_loss(
            self, model: Any, inputs: Any, return_outputs: bool = False, num_items_in_batch: Any = None
        ) -> Any:
            if model.training:
                mask, positions = inputs.get("attention_mask"), inputs.get("position_ids")
                self.tokens_seen += int(mask.sum()) if mask is not None else tokens_in(positions)
            if inputs["input_ids"].is_cuda or return_outputs or not self.takes_positions:
                return SFTTrainer.compute_loss(self, model, inputs, return_outputs, num_items_in_batch)
            labels = inputs["labels"][:, 1:]  # the token after each position
            positions = (labels != -100).any(dim=0).nonzero()[:, 0]
            labels = labels[:, positions]
            logits = model(
                **{key: value for key, value in inputs.items() if key != "labels"},
                use_cache=False,
                logits_to_keep=positions,
            ).logits
            total = torch.nn.functional.cross_entropy(
                logits.float().flatten(0, 1), labels.flatten(), ignore_index=-100, reduction="sum"
            )
            if num_items_in_batch is None:
                return total / (labels != -100).sum()
            # The count is that of all processes, and their gradients are averaged.
            return total / num_items_in_batch * self.args.world_size

    return Trainer
