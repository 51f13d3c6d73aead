"""DPO, IPO and KTO: labelled answers → TRL's trainers, whose losses are relative to a reference.

The reference is the base with the adapter switched off; where the training goes on from an adapter it is a frozen copy
of that one. The answers come with ids and labels, so TRL tokenises nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from adapterhub.trainers.labels.examples import IGNORED, Example
from adapterhub.trainers.labels.splits import Split
from adapterhub.trainers.methods.behaviour import Behaviour
from adapterhub.trainers.model import new_adapter
from adapterhub.trainers.prepare import Prepared

Row = Mapping[str, Any]


def preference_trainer(
    prepared: Prepared, *, model: Any, arguments: Mapping[str, Any], callbacks: Sequence[Any]
) -> Any:
    """The trainer of ``rl: dpo``, ``ipo`` or ``kto``, not begun."""
    config = prepared.config
    make, kind = (_kto, "kto") if config.rl == "kto" else (_dpo, "dpo")
    rows = judged_rows if kind == "kto" else pair_rows
    trainer_class, options = make(prepared)
    trainer = trainer_class(
        model=model,
        args=options(arguments),
        train_dataset=rows(prepared.train, config.micro_batch_size, config.sequence_len),
        eval_dataset=rows(prepared.evaluation, config.eval_batch_size, config.sequence_len)
        if prepared.evaluation
        else None,
        data_collator=collator(pad=prepared.tokenizer.pad_token_id, kind=kind),
        processing_class=prepared.tokenizer,
        peft_config=new_adapter(prepared),
        callbacks=list(callbacks),
    )
    trainer.loraplus_lr_ratio = config.loraplus_lr_ratio
    return trainer


def _dpo(prepared: Prepared) -> tuple[Any, Callable[[Mapping[str, Any]], Any]]:
    from trl import DPOConfig, DPOTrainer

    class Trainer(Behaviour, DPOTrainer):  # type: ignore[misc]
        def _prepare_dataset(self, dataset: Any, *_: Any) -> Any:
            return dataset

    config = prepared.config
    losses = list(config.dpo_loss_type) or ["ipo" if config.rl == "ipo" else "sigmoid"]

    def options(arguments: Mapping[str, Any]) -> Any:
        return DPOConfig(
            **arguments,
            **_common(prepared),
            loss_type=losses,
            loss_weights=list(config.dpo_loss_weights) or None,
            label_smoothing=config.dpo_label_smoothing,
        )

    return Trainer, options


def _kto(prepared: Prepared) -> tuple[Any, Callable[[Mapping[str, Any]], Any]]:
    from trl import KTOConfig, KTOTrainer

    class Trainer(Behaviour, KTOTrainer):  # type: ignore[misc]
        def _prepare_dataset(self, dataset: Any, *_: Any) -> Any:
            return dataset

    config = prepared.config

    def options(arguments: Mapping[str, Any]) -> Any:
        in_order = {"train_sampling_strategy": "sequential"}  # each row's neighbour is in its batch: `mismatched`
        return KTOConfig(
            **{**arguments, **in_order},
            **_common(prepared),
            desirable_weight=config.kto_desirable_weight,
            undesirable_weight=config.kto_undesirable_weight,
        )

    return Trainer, options


def _common(prepared: Prepared) -> dict[str, Any]:
    config = prepared.config
    return {
        "beta": 0.1 if config.rl_beta is None else config.rl_beta,
        "precompute_ref_log_probs": config.precompute_ref_log_probs,
        "max_length": None,
        "remove_unused_columns": False,
    }


# ── rows and batches ─────────────────────────────────────────────────────────────────────────────────────────


def pair_rows(split: Split, *_: int) -> Any:
    """One row a pair."""
    from datasets import Dataset

    chosen, rejected = split.examples[::2], split.examples[1::2]
    return Dataset.from_dict(
        {
            "chosen_ids": [e.input_ids for e in chosen],
            "chosen_labels": [e.labels for e in chosen],
            "rejected_ids": [e.input_ids for e in rejected],
            "rejected_labels": [e.labels for e in rejected],
        }
    )


def judged_rows(split: Split, batch: int, limit: int) -> Any:
    """One row an answer, with the answer of another row of its batch to the same prompt, for KTO's reference point."""
    from datasets import Dataset

    others = [
        _answer_to(split.examples[i], split.examples[k], limit)
        for i, k in enumerate(mismatched(len(split.examples), batch))
    ]
    return Dataset.from_dict(
        {
            "ids": [e.input_ids for e in split.examples],
            "labels": [e.labels for e in split.examples],
            "kl_ids": [ids for ids, _ in others],
            "kl_labels": [labels for _, labels in others],
            "good": list(split.good),
        }
    )


def mismatched(rows: int, batch: int) -> list[int]:
    """For each row the place of another one, of the same batch of ``batch`` rows where it has more than one.

    KTO (arXiv:2402.01306, section 4.1) estimates how far the model is from the reference by the answers of a batch,
    each after another's prompt.
    """
    found = []
    for start in range(0, rows, batch):
        together = list(range(start, min(start + batch, rows)))
        found += [together[-1], *together[:-1]] if len(together) > 1 else [max(start - 1, 0)]
    return found


def _answer_to(example: Example, other: Example, limit: int) -> tuple[list[int], list[int]]:
    own, theirs = (next(i for i, label in enumerate(e.labels) if label != IGNORED) for e in (example, other))
    ids = example.input_ids[:own] + other.input_ids[theirs:]
    labels = example.labels[:own] + other.labels[theirs:]
    return ids[:limit], labels[:limit]


def collator(*, pad: int, kind: str) -> Callable[[Sequence[Row]], dict[str, Any]]:
    """Rows → a batch. Of pairs the first half are the chosen answers, the second the rejected ones.

    Args:
        kind: ``dpo`` and ``kto`` name the tensors as TRL's trainers want them; ``pairs`` is a plain batch with labels.
    """
    import torch

    def collate(rows: Sequence[Row]) -> dict[str, Any]:
        if kind == "kto":
            batch = {
                **_masked(_batch(rows, ("ids",), ("labels",), pad)),
                "label": torch.tensor([r["good"] for r in rows]),
            }
            batch |= {f"KL_{k}": v for k, v in _masked(_batch(rows, ("kl_ids",), ("kl_labels",), pad)).items()}
            known = ("ref_logps", "ref_KL_logps")
        else:
            batch = _batch(rows, ("chosen_ids", "rejected_ids"), ("chosen_labels", "rejected_labels"), pad)
            batch = _masked(batch) if kind == "dpo" else batch
            known = ("ref_chosen_logps", "ref_rejected_logps")
        return batch | {key: torch.tensor([row[key] for row in rows]) for key in known if key in rows[0]}

    return collate


def _batch(rows: Sequence[Row], ids: Sequence[str], labels: Sequence[str], pad: int) -> dict[str, Any]:
    import torch

    columns = [[row[key] for key in keys for row in rows] for keys in (ids, labels)]
    longest = max(len(values) for values in columns[0])

    def padded(column: list[list[int]], fill: int) -> Any:
        return torch.tensor([[*values, *[fill] * (longest - len(values))] for values in column])

    mask = [[1] * len(values) for values in columns[0]]
    return {
        "input_ids": padded(columns[0], pad),
        "attention_mask": padded(mask, 0),
        "labels": padded(columns[1], IGNORED),
    }


def _masked(batch: dict[str, Any]) -> dict[str, Any]:
    """TRL's trainers take a mask of the answer instead of labels."""
    labels = batch.pop("labels")
    return {**batch, "completion_mask": (labels != IGNORED).long()}
