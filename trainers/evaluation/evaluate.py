"""How good adapters are on rows that they were not trained on, beside their base and each other.

    scored = evaluate(prepared, [Subject("base"), Subject("acme/support@3", folder)], scorers=[scorer("exact_match")])
    scored["base"]["eval_loss"], scored["acme/support@3"]["exact_match"]

The loss is the mean over the trained tokens of all rows, as in training. An answer is made for the last trained turn of
a row, greedily, after exactly the tokens that stand before it.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Container, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from adapterhub.errors import AdapterError, RunFailed
from adapterhub.scorers import Scorer
from adapterhub.trainers.config import DataSource, TrainConfig
from adapterhub.trainers.events import Listener, Stage, ignore
from adapterhub.trainers.labels.examples import IGNORED, Example
from adapterhub.trainers.labels.tokenizer import generation_ends
from adapterhub.trainers.model import load_model
from adapterhub.trainers.prepare import Prepared, prepare
from adapterhub.trainers.quiet import quiet

Metrics = Mapping[str, float]
BASE = "base"
ANSWERED_AT_ONCE = 16  # rows: on a CPU sixteen answers take little longer than one, the weights being read once


@dataclass(frozen=True)
class Subject:
    """What is evaluated: the base where ``adapter`` is None, else the base with that adapter directory."""

    label: str
    adapter: Path | None = None


def prepare_evaluation(base: str, data: Sequence[Path], *, adapter: Path | None, limit: int | None = None) -> Prepared:
    """Rows for an evaluation, labelled with the template that the adapter was trained with. Raises as `prepare`."""
    template = adapter / "chat_template.jinja" if adapter else None
    config = TrainConfig(
        base_model=base,
        datasets=tuple(DataSource(path=str(path)) for path in data),
        sequence_len=2**20,
        shuffle_merged_datasets=False,
        excess_length_strategy="truncate",
    )
    if template is not None and template.is_file():
        config = replace(config, chat_template="jinja", chat_template_jinja=str(template))
    prepared = prepare(config)
    rows = replace(prepared.train, examples=prepared.train.examples[:limit])
    return replace(prepared, train=rows, evaluation=rows)


def evaluate(
    prepared: Prepared,
    subjects: Sequence[Subject],
    *,
    scorers: Sequence[tuple[str, Scorer]] = (),
    max_new_tokens: int = 256,
    on_event: Listener = ignore,
) -> Mapping[str, Metrics]:
    """Metrics by the subjects' labels, on ``prepared.evaluation``.

    ``eval_loss`` (nats a token) and ``perplexity``; with scorers the mean of each, and ``ended``: the share of answers
    that the model ended by itself.

    Raises:
        AdapterError: an adapter that does not load on this base.
        RunFailed: out of memory, or whatever broke below us.
        MissingDependency: the ``train`` extra is not installed.
    """
    assert prepared.evaluation is not None
    rows = prepared.evaluation.examples
    with quiet(None):
        on_event(Stage(f"loading {prepared.base.name}"))
        try:
            model = load_model(prepared).eval()
            scored: dict[str, Metrics] = {}
            for subject in subjects:
                on_event(Stage(f"evaluating {subject.label} on {len(rows)} rows"))
                with wearing(model, subject) as measured:
                    metrics = _losses(measured, rows)
                    if scorers:
                        metrics |= _answers(measured, prepared, rows, scorers, max_new_tokens)
                scored[subject.label] = metrics
            return scored
        except RuntimeError as error:
            raise RunFailed("the evaluation broke off", why=str(error).strip().splitlines()[0]) from error


class wearing:  # noqa: N801  reads as a word: with wearing(model, subject)
    """The model with the subject's adapter on it, and without it afterwards."""

    def __init__(self, model: Any, subject: Subject) -> None:
        self.model, self.subject, self.peft = model, subject, None

    def __enter__(self) -> Any:
        if self.subject.adapter is None:
            return self.model
        from peft import PeftModel

        try:
            self.peft = PeftModel.from_pretrained(self.model, str(self.subject.adapter)).eval()
        except (RuntimeError, ValueError, KeyError, OSError) as error:
            raise AdapterError(
                f"{self.subject.label} does not load on this base",
                why=str(error).strip().splitlines()[0],
                hint="name the base that it was trained on with --base",
            ) from error
        return self.peft

    def __exit__(self, *_: object) -> None:
        if self.peft is not None:
            self.peft.unload()


def _losses(model: Any, rows: Sequence[Example]) -> dict[str, float]:
    import torch

    total = count = 0.0
    for row in rows:
        ids = torch.tensor([row.input_ids], device=model.device)
        labels = torch.tensor([row.labels], device=model.device)
        with torch.inference_mode():
            logits = model(input_ids=ids, use_cache=False).logits
            total += float(
                torch.nn.functional.cross_entropy(
                    logits[0, :-1].float(), labels[0, 1:], ignore_index=IGNORED, reduction="sum"
                )
            )
        count += sum(label != IGNORED for label in row.labels[1:])
    loss = total / max(count, 1)
    return {"eval_loss": round(loss, 6), "perplexity": round(math.exp(min(loss, 700.0)), 6)}


def _answers(
    model: Any, prepared: Prepared, rows: Sequence[Example], scorers: Sequence[tuple[str, Scorer]], limit: int
) -> dict[str, float]:
    totals = dict.fromkeys([name for name, _ in scorers], 0.0) | {"ended": 0.0}
    for batch in _batches(rows):
        for row, (answer, ended) in zip(batch, _answered(model, prepared, batch, limit), strict=True):
            reference = _decoded(prepared, row.input_ids[last_turn(row) :])
            for name, score in scorers:
                totals[name] += score(answer, reference)
            totals["ended"] += ended
    return {name: round(total / len(rows), 6) for name, total in totals.items()}


def _batches(rows: Sequence[Example]) -> Iterator[list[Example]]:
    """Rows that are answered together: prompts of about the same length, and one token that ends them all."""
    in_order = sorted(rows, key=lambda row: (row.input_ids[-1], last_turn(row)))
    for _, alike in itertools.groupby(in_order, key=lambda row: row.input_ids[-1]):
        left = list(alike)
        for start in range(0, len(left), ANSWERED_AT_ONCE):
            yield left[start : start + ANSWERED_AT_ONCE]


def last_turn(row: Example) -> int:
    """Where the last trained turn begins: the first of the labels that run to the row's last one."""
    start = max(i for i, label in enumerate(row.labels) if label != IGNORED)
    while start > 0 and row.labels[start - 1] != IGNORED:
        start -= 1
    return start


def _answered(model: Any, prepared: Prepared, rows: Sequence[Example], limit: int) -> list[tuple[str, bool]]:
    """Answers of one batch, greedily, and whether each ended by itself. Prompts are filled up on the left."""
    import torch

    prompts = [row.input_ids[: max(1, last_turn(row))] for row in rows]
    ends = {*generation_ends(prepared.base), prepared.tokenizer.eos_token_id, rows[0].input_ids[-1]} - {None}
    longest = max(map(len, prompts))
    fill = prepared.tokenizer.pad_token_id
    ids = torch.tensor([[fill] * (longest - len(p)) + p for p in prompts], device=model.device)
    mask = torch.tensor([[0] * (longest - len(p)) + [1] * len(p) for p in prompts], device=model.device)
    with torch.inference_mode():
        made = model.generate(
            input_ids=ids,
            attention_mask=mask,
            max_new_tokens=limit,
            do_sample=False,
            temperature=None,
            top_p=None,
            top_k=None,
            use_cache=True,
            eos_token_id=sorted(ends),
            pad_token_id=fill,
        )[:, longest:].tolist()
    return [_cut(prepared, answer, ends) for answer in made]


def _cut(prepared: Prepared, made: Sequence[int], ends: Container[int]) -> tuple[str, bool]:
    """An answer's text up to its end, and whether it has one: what follows fills the batch up."""
    end = next((i for i, token in enumerate(made) if token in ends), None)
    return _decoded(prepared, made if end is None else made[: end + 1]), end is not None


def _decoded(prepared: Prepared, ids: Sequence[int]) -> str:
    text: str = prepared.tokenizer.decode(ids, skip_special_tokens=True)
    return text
