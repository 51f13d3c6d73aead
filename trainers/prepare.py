"""Everything that can be known before a weight is loaded: the data read, the labels made, the advice given."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from adapterhub.base import BaseModel, find_base
from adapterhub.trainers import checks
from adapterhub.trainers.config import DataSource, Method, TrainConfig
from adapterhub.trainers.data import DataFile, read_source
from adapterhub.trainers.deepspeed import read_deepspeed
from adapterhub.trainers.labels.ends import taught_end
from adapterhub.trainers.labels.labels import Labeler
from adapterhub.trainers.labels.splits import Rows, Split, divided, labelled
from adapterhub.trainers.labels.tokenizer import check_served_alike, generation_ends, load_tokenizer, template_of
from adapterhub.trainers.room import room, too_little
from adapterhub.trainers.start import FindVersion, Start, continued, find_start


@dataclass(frozen=True)
class Prepared:
    """A training that passed every check and needs only its weights."""

    config: TrainConfig  # with every default filled in
    base: BaseModel
    tokenizer: Any
    template: str | None  # the chat template's text; None where no row is chat
    train: Split
    evaluation: Split | None
    lora_parameters: int
    advice: tuple[str, ...]
    start: Start | None = None  # the adapter that it goes on from
    end: str | None = None  # a token that ends answers, where serving would not stop at it by itself


def prepare(
    config: TrainConfig,
    *,
    beside: Mapping[str, Path | None] | None = None,
    find_version: FindVersion | None = None,
) -> Prepared:
    """Find the base, read all data, make all labels.

    Args:
        beside: the config file's folder, where its relative paths are looked up first; by ``datasets``,
            ``test_datasets``, ``config`` and ``lora_model_dir``, because flags speak of the working directory.
        find_version: finds the files of a version that ``lora_model_dir`` names; None: nobody does.

    Raises:
        NotFound: the base, its tokenizer, or the adapter to go on from is not there.
        BaseMismatch: that adapter was trained on another base.
        MissingDependency: the ``train`` extra is not installed.
        DataError: a data file or row; a row without a trained token; no row is left.
        ConfigError: a template, token or target module that the base does not have.
    """
    beside = beside or {}
    config = replace(config, deepspeed=read_deepspeed(config, beside.get("config")))
    files = _read(config.datasets, beside.get("datasets"), config.skip_bad_rows, config.rl)
    left = config.skip_bad_rows - sum(len(file.skipped) for file in files)
    test_files = _read(config.test_datasets, beside.get("test_datasets"), left, config.rl)
    base = find_base(config.base_model, revision=config.model_revision)
    start = None
    if config.lora_model_dir is not None:
        start = find_start(config.lora_model_dir, beside=beside.get("lora_model_dir"), find_version=find_version)
        config = continued(config, start, base)
    tokenizer = load_tokenizer(base, config)
    chat = any(file.chat for file in (*files, *test_files))
    template = template_of(config, tokenizer, beside.get("config")) if chat else None
    if template is not None:
        check_served_alike(base, config, tokenizer, template)
    labeler = Labeler(
        tokenizer,
        template=template,
        train_on_inputs=config.train_on_inputs,
        end_ids=generation_ends(base),
        eot_tokens=config.eot_tokens,
    )
    positions = (base.config.get("text_config") or base.config).get("max_position_embeddings")
    limit = min(config.sequence_len, positions or config.sequence_len)
    rows, held_out = divided(files, config)
    tests = Rows(test_files)
    if config.dataset_exact_deduplication:
        tests = tests.distinct(seen=Rows(files))
    train = labelled(files, rows, labeler, config, limit)
    test_rows = held_out or tests
    evaluation = labelled(test_files or files, test_rows, labeler, config, limit) if test_rows else None
    expected = checks.learning_rate(base.config, config.rl)
    config = replace(config, learning_rate=config.learning_rate or expected)
    parameters = checks.lora_parameters(base, config)
    facts = checks.Facts(
        train.trained_tokens,
        parameters,
        expected,
        positions,
        good=sum(train.good),
        bad=len(train.good) - sum(train.good),
        text_beside_a_template=config.rl is not None and not chat and tokenizer.chat_template is not None,
    )
    longest = max(train.examples.lengths)
    as_seen = config if config.sample_packing else replace(config, sequence_len=longest)
    shortage = too_little(as_seen, base.config, room())
    end = taught_end(base, config, labeler)
    never = f"an answer ends with {end}, where the base does not stop by itself: the adapter says so to ah serve"
    advice = (*checks.advise(config, facts), *([shortage] if shortage else []), *([never] if end else []))
    return Prepared(config, base, tokenizer, template, train, evaluation, parameters, advice, start, end)


def _read(
    sources: Sequence[DataSource], beside: Path | None, skip_bad_rows: int, method: Method | None
) -> tuple[DataFile, ...]:
    files: list[DataFile] = []
    for source in sources:
        left = skip_bad_rows - sum(len(file.skipped) for file in files)
        files.append(read_source(source, beside=beside, skip_bad_rows=left, method=method))
    return tuple(files)
