"""Preference training of the tiny base: each method's loss is the one of its paper, and it learns."""

from __future__ import annotations

import json
import os
import signal
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import yaml

from adapterhub import peftdir
from adapterhub.errors import DataError
from adapterhub.trainers import (
    Interrupted,
    read_config,
    read_run,
    read_yaml,
    resume,
    train,
)
from adapterhub.trainers.arguments import arguments
from adapterhub.trainers.events import Evaluated, Event, Step
from adapterhub.trainers.fit import trainer_of
from adapterhub.trainers.labels.examples import IGNORED
from adapterhub.trainers.methods.preference import mismatched
from adapterhub.trainers.model import load_model
from adapterhub.trainers.quiet import quiet
from adapterhub.trainers.shortage import smaller_batch
from tests.trainers.conftest import PAIRS, begin, trained

pytestmark = pytest.mark.slow

Writer = Callable[..., Path]


def lines(folder: Path, key: str = "loss") -> list[float]:
    found = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [line[key] for line in found if key in line]


def log_probabilities(model: Any, ids: Any, labels: Any) -> tuple[Any, Any]:
    """Of each answer of a batch: the sum over its tokens, and the mean; from the model's own logits."""
    import torch

    with torch.no_grad():
        table = torch.log_softmax(model(input_ids=ids).logits[:, :-1], dim=-1)
    sums, means = [], []
    for row, wanted in zip(table, labels[:, 1:], strict=True):
        found = torch.stack([row[i, token] for i, token in enumerate(wanted.tolist()) if token != IGNORED])
        sums.append(found.sum())
        means.append(found.mean())
    return torch.stack(sums), torch.stack(means)


def answers(batch: Any, name: str = "") -> tuple[Any, Any]:
    """Token ids, and labels, of a batch as any of the trainers has it."""
    ids = batch[f"{name}input_ids"]
    if "labels" in batch:
        return ids, batch["labels"]
    return ids, ids.masked_fill(batch[f"{name}completion_mask"] == 0, IGNORED)


@pytest.mark.parametrize("method", ["dpo", "ipo", "kto", "orpo", "simpo"])
def test_the_loss_is_that_of_the_paper(method: str, write_config: Writer, tmp_path: Path) -> None:
    """A fixed batch, an adapter that is not zero, and the papers' formulas on plain forward passes."""
    import torch
    from torch.nn.functional import logsigmoid

    config = write_config(
        rows=PAIRS, rl=method, rl_beta=0.3, micro_batch_size=6, orpo_alpha=0.4, simpo_gamma=0.7, cpo_alpha=0.2,
        kto_desirable_weight=1.5,
    )  # fmt: skip
    _, prepared = begin(config)
    with quiet(None):
        trainer = trainer_of(prepared.config)(
            prepared, model=load_model(prepared), arguments=arguments(prepared, tmp_path), callbacks=[]
        )
        model = trainer.model.eval()
        torch.manual_seed(1)
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                torch.nn.init.normal_(parameter, std=0.1)
        batch = next(iter(trainer.get_train_dataloader()))
        found = float(trainer.compute_loss(model, batch))

    sums, means = log_probabilities(model, *answers(batch))
    with model.disable_adapter():
        reference, reference_means = log_probabilities(model, *answers(batch))
    ratios = sums - reference
    assert float(ratios.abs().min()) > 0.01  # the model is not where it began
    (chosen, rejected), (better, worse) = means.chunk(2), ratios.chunk(2)
    if method == "dpo":  # arXiv:2305.18290, equation 7
        expected = -logsigmoid(0.3 * (better - worse))
    elif method == "ipo":  # arXiv:2310.12036, equation 17, of mean log ratios
        c, r = (means - reference_means).chunk(2)
        expected = (c - r - 1 / (2 * 0.3)) ** 2
    elif method == "kto":  # arXiv:2402.01306, equations 7 and 8
        there, _ = log_probabilities(model, *answers(batch, "KL_"))
        with model.disable_adapter():
            here, _ = log_probabilities(model, *answers(batch, "KL_"))
        z0 = (there - here).mean().clamp(min=0)
        value = torch.where(batch["label"], torch.sigmoid(0.3 * (ratios - z0)), torch.sigmoid(0.3 * (z0 - ratios)))
        expected = torch.where(batch["label"], 1.5, 1.0) * (1 - value)
    elif method == "orpo":  # arXiv:2403.07691, equations 3 to 7
        odds = torch.log(chosen.exp() / (1 - chosen.exp())) - torch.log(rejected.exp() / (1 - rejected.exp()))
        expected = -chosen - 0.4 * logsigmoid(odds)
    else:  # arXiv:2405.14734, equation 6, and the likelihood that cpo_alpha asks for
        expected = -logsigmoid(0.3 * chosen - 0.3 * rejected - 0.7) - 0.2 * chosen
    assert found == pytest.approx(float(expected.mean()), abs=1e-5)


@pytest.mark.parametrize("method", ["dpo", "kto", "orpo"])
def test_a_method_learns_and_says_what_it_learnt(method: str, write_config: Writer) -> None:
    config = write_config(rows=PAIRS, rl=method, micro_batch_size=4, max_steps=12, val_set_size=3, learning_rate=0.02)
    events: list[Event] = []
    reading, prepared = begin(config)
    result = train(reading, prepared, on_event=events.append)
    assert lines(result.folder)[-1] < lines(result.folder)[0]
    evaluation = result.fitted.evaluation
    assert evaluation["eval_reward_margin"] > 0
    record = result.record.lineage
    assert record.method == method
    assert record.metrics["eval_reward_margin"] == pytest.approx(evaluation["eval_reward_margin"], abs=1e-6)
    told = next(event for event in events if isinstance(event, Evaluated))
    assert told.reward_margin == evaluation["eval_reward_margin"]
    if method != "kto":
        assert evaluation["eval_reward_accuracy"] == 1.0
    assert peftdir.verdicts(peftdir.read(result.adapter)).serve.answer == "yes"
    page = (result.folder / "report.html").read_text()
    assert "reward margin" in page
    assert result.to_json()["eval_reward_margin"] == evaluation["eval_reward_margin"]


@pytest.mark.parametrize("method", ["dpo", "ipo", "kto", "orpo", "simpo"])
def test_a_4_bit_base_is_compared_on_and_its_adapter_keeps_its_precision(method: str, write_config: Writer) -> None:
    result = trained(write_config(rows=PAIRS, rl=method, adapter="qlora", load_in_4bit=True, max_steps=4))
    assert peftdir.read(result.adapter).shape.dtype == "F32"
    found = lines(result.folder)
    assert len(found) == 4
    assert found[-1] < found[0]


def test_an_8_bit_base_is_compared_on(write_config: Writer) -> None:
    result = trained(write_config(rows=PAIRS, rl="dpo", load_in_8bit=True, max_steps=4))
    found = lines(result.folder)
    assert found[0] == pytest.approx(0.6931, abs=0.02)  # the adapter has changed nothing yet
    assert found[-1] < found[0]


def test_the_reference_can_be_computed_before_the_first_step(write_config: Writer, tmp_path: Path) -> None:
    config = write_config(rows=PAIRS, rl="dpo", max_steps=4)
    plain = trained(config, output_dir=str(tmp_path / "plain"))
    before = trained(config, output_dir=str(tmp_path / "before"), precompute_ref_log_probs=True)
    assert lines(before.folder) == pytest.approx(lines(plain.folder), abs=1e-5)


@pytest.mark.parametrize("method", ["dpo", "simpo"])
def test_accumulation_is_the_same_as_a_larger_batch(method: str, write_config: Writer, tmp_path: Path) -> None:
    config = write_config(rows=PAIRS, rl=method, max_steps=2, micro_batch_size=12)
    one = trained(config, output_dir=str(tmp_path / "one"))
    many = trained(config, output_dir=str(tmp_path / "many"), micro_batch_size=3, gradient_accumulation_steps=4)
    assert lines(many.folder) == pytest.approx(lines(one.folder), rel=1e-4)


def test_a_broken_off_run_goes_on_the_same(write_config: Writer, tmp_path: Path) -> None:
    config = write_config(rows=PAIRS, rl="dpo", max_steps=6)
    whole = trained(config, output_dir=str(tmp_path / "whole"))
    folder = tmp_path / "broken"

    def interrupt(event: Event) -> None:
        if isinstance(event, Step) and event.step == 2:
            os.kill(os.getpid(), signal.SIGINT)

    with pytest.raises(Interrupted):
        train(*begin(config, output_dir=str(folder)), on_event=interrupt)
    resume(folder, read_run(folder))
    assert lines(folder) == lines(whole.folder)
    assert (folder / "adapter/adapter_model.safetensors").read_bytes() == (
        whole.adapter / "adapter_model.safetensors"
    ).read_bytes()


def test_early_stopping_keeps_the_best(write_config: Writer, write_rows: Writer) -> None:
    against = [{**row, "chosen": row["rejected"], "rejected": row["chosen"]} for row in PAIRS]
    write_rows(against, name="against.jsonl")  # the more it learns, the worse it is on these
    config = write_config(
        rows=PAIRS, rl="dpo", max_steps=8, test_datasets=[{"path": "against.jsonl"}], eval_steps=1,
        early_stopping_patience=1, lr_scheduler="constant", warmup_steps=0,
    )  # fmt: skip
    result = trained(config)
    evals = lines(result.folder, "eval_loss")
    assert len(evals) < 8
    assert result.fitted.eval_loss == min(evals)
    assert result.fitted.evaluation["eval_reward_margin"] in lines(result.folder, "eval_reward_margin")


# ── before a model is loaded ──


@pytest.mark.parametrize(
    ("rows", "batch", "found"), [(4, 2, [1, 0, 3, 2]), (5, 2, [1, 0, 3, 2, 3]), (3, 4, [2, 0, 1]), (1, 2, [0])]
)
def test_each_answer_is_measured_against_another_of_its_batch(rows: int, batch: int, found: list[int]) -> None:
    assert mismatched(rows, batch) == found


def test_a_pair_with_an_answer_that_is_too_long_is_left_out_whole(write_config: Writer) -> None:
    long = {**PAIRS[0], "rejected": "What? " * 50}
    _, prepared = begin(write_config(rows=[*PAIRS, long], rl="dpo", sequence_len=64))
    assert (prepared.train.rows, len(prepared.train.examples), len(prepared.train.dropped)) == (12, 24, 1)
    assert prepared.train.dropped[0].endswith("train.jsonl:13")
    _, cut = begin(write_config(rows=[*PAIRS, long], rl="dpo", sequence_len=64, excess_length_strategy="truncate"))
    assert (cut.train.rows, cut.train.truncated) == (13, 1)
    with pytest.raises(DataError, match="is left to train on"):
        begin(write_config(rows=[long], rl="dpo", sequence_len=64))


def test_kto_takes_pairs_as_good_and_bad_answers_and_advises_on_their_balance(write_config: Writer) -> None:
    _, prepared = begin(write_config(rows=PAIRS, rl="kto"))
    assert (prepared.train.rows, sum(prepared.train.good)) == (24, 12)
    assert len(set(zip(prepared.train.good[::2], prepared.train.good[1::2], strict=True))) > 1  # shuffled
    assert not any("weigh" in text for text in prepared.advice)
    judged = [
        {"prompt": [{"role": "user", "content": f"{i}?"}], "completion": "Ahoy!", "label": i > 2} for i in range(12)
    ]
    _, uneven = begin(write_config(rows=judged, rl="kto"))
    assert any("kto_desirable_weight: 0.33" in text for text in uneven.advice)
    with pytest.raises(DataError, match="holds one answer"):
        begin(write_config(rows=judged[:1], rl="kto"))


def test_kto_keeps_two_rows_at_once_where_memory_runs_out(write_config: Writer) -> None:
    _, prepared = begin(write_config(rows=PAIRS, rl="kto"))
    assert smaller_batch(prepared.config) is None
    assert smaller_batch(replace(prepared.config, micro_batch_size=4)) is not None


def test_plain_text_is_advised_against_where_the_base_is_asked_by_chat(write_config: Writer) -> None:
    rows = [{"prompt": f"Say {i}.", "chosen": "Ahoy!", "rejected": "What?"} for i in range(12)]
    _, prepared = begin(write_config(rows=rows, rl="dpo"))
    assert any("type: chat_template" in text for text in prepared.advice)
    assert prepared.config.learning_rate == 0.01
    config = write_config(rows=PAIRS, rl="dpo", learning_rate=None)
    _, prepared = begin(config)
    _, supervised = begin(write_config(learning_rate=None))
    assert prepared.config.learning_rate == pytest.approx((supervised.config.learning_rate or 0) / 20, rel=0.05)


def test_show_labels_shows_both_answers(ah: Callable[..., Any], write_config: Writer) -> None:
    found = ah("train", write_config(rows=PAIRS, rl="dpo", shuffle_merged_datasets=False), "--show-labels", 1)
    assert found.code == 0
    assert "train.jsonl:1, chosen" in found.out
    assert "⟦Ahoy, 0!<|im_end|>⟧" in found.out
    assert "train.jsonl:1, rejected" in found.out
    judged = [{"prompt": [{"role": "user", "content": "Hi"}], "completion": f"{i}", "label": i > 0} for i in range(3)]
    rows = json.loads(ah("train", write_config(rows=judged, rl="kto"), "--show-labels", 3, "--json").out)
    assert sorted(row["answer"] for row in rows) == ["bad", "good", "good"]


def test_a_resolved_config_reads_back_the_same(write_config: Writer, tmp_path: Path) -> None:
    config = write_config(
        rows=PAIRS, rl="dpo", dpo_loss_type=["sigmoid", "sft"], dpo_loss_weights=[1, 0.5],
        datasets=[{"path": "train.jsonl", "type": {"field_prompt": "messages", "field_chosen": "chosen"}}],
    )  # fmt: skip
    _, prepared = begin(config)
    (tmp_path / "again.yml").write_text(prepared.config.to_yaml())
    assert read_config(read_yaml(tmp_path / "again.yml")).config == prepared.config
    assert yaml.safe_load(prepared.config.to_yaml())["rl"] == "dpo"
