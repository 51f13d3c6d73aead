"""Everything that can be known before a weight is loaded: the data read, the labels made, the advice given."""

from __future__ import annotations

import bisect
import itertools
import json
import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, overload

from adapterhub.base import BaseModel, find_base
from adapterhub.errors import ConfigError, DataError, MissingDependency, NotFound
from adapterhub.trainers import checks
from adapterhub.trainers.config import DataSource, TrainConfig
from adapterhub.trainers.data import DataFile, Row, read_source
from adapterhub.trainers.labels import CHATML, Example, Labeler


@dataclass(frozen=True)
class Split:
    """Rows for one purpose, as the model will see them."""

    files: tuple[DataFile, ...]
    examples: tuple[Example, ...]
    dropped: tuple[str, ...] = ()  # file:line of rows longer than sequence_len
    truncated: int = 0

    @property
    def tokens(self) -> int:
        return sum(len(example.input_ids) for example in self.examples)

    @property
    def trained_tokens(self) -> int:
        return sum(example.trained for example in self.examples)


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


def prepare(config: TrainConfig, *, beside: Mapping[str, Path | None] | None = None) -> Prepared:
    """Find the base, read all data, make all labels.

    Args:
        beside: the config file's folder, where its relative paths are looked up first; by ``datasets``,
            ``test_datasets`` and ``config``, because flags speak of the working directory.

    Raises:
        NotFound: the base, or its tokenizer, is not there.
        MissingDependency: the ``train`` extra is not installed.
        DataError: a data file or row; a row without a trained token; no row is left.
        ConfigError: a template, token or target module that the base does not have.
    """
    beside = beside or {}
    if config.rl or config.lora_model_dir or config.peft_init_lora_weights not in (True, False, "gaussian"):
        raise ConfigError("this method cannot be trained yet", hint="ah train CONFIG.yml --check")
    files = _read(config.datasets, beside.get("datasets"), config.skip_bad_rows)
    left = config.skip_bad_rows - sum(len(file.skipped) for file in files)
    test_files = _read(config.test_datasets, beside.get("test_datasets"), left)
    base = find_base(config.base_model, revision=config.model_revision)
    tokenizer = load_tokenizer(base, config)
    chat = any(file.chat for file in (*files, *test_files))
    template = _template(config, tokenizer, beside.get("config")) if chat else None
    labeler = Labeler(
        tokenizer, template=template, train_on_inputs=config.train_on_inputs, end_ids=generation_ends(base)
    )
    positions = (base.config.get("text_config") or base.config).get("max_position_embeddings")
    limit = min(config.sequence_len, positions or config.sequence_len)
    rows, held_out = _split(files, config)
    train = _labelled(files, rows, labeler, config, limit)
    test_rows = held_out or _Rows(test_files)
    evaluation = _labelled(test_files or files, test_rows, labeler, config, limit) if test_rows else None
    expected = checks.learning_rate(base.config)
    config = replace(config, learning_rate=config.learning_rate or expected)
    parameters = checks.lora_parameters(base, config)
    facts = checks.Facts(train.trained_tokens, parameters, expected, positions)
    return Prepared(
        config, base, tokenizer, template, train, evaluation, parameters, tuple(checks.advise(config, facts))
    )


def load_tokenizer(base: BaseModel, config: TrainConfig) -> Any:
    """The base's tokenizer, with the config's special tokens. Raises as `prepare`."""
    try:
        from transformers import AutoTokenizer
    except ImportError as error:
        raise MissingDependency(
            "training needs transformers", why=str(error), hint='pip install "adapterhub[train]"'
        ) from error
    try:
        tokenizer = AutoTokenizer.from_pretrained(base.path, trust_remote_code=config.trust_remote_code)
    except (OSError, ValueError) as error:
        raise NotFound(
            f"the base {base.name} has no tokenizer that can be read",
            why=str(error).strip().splitlines()[0],
            hint=f"put the tokenizer's files beside its weights: ls {base.path}",
        ) from error
    for key, token in config.special_tokens.items():
        if key not in ("pad_token", "eos_token", "bos_token", "unk_token"):
            raise ConfigError(f"special_tokens: {key!a} is not a special token", why="expects pad_token or eos_token")
        if token not in tokenizer.get_vocab():
            raise ConfigError(
                f"special_tokens: the base {base.name} has no token {token!a}",
                why="a new token needs a trained embedding, which the serving engine does not take",
                hint="name a token of the base's own vocabulary",
            )
        setattr(tokenizer, key, token)
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token or tokenizer.convert_ids_to_tokens(0)
    return tokenizer


def generation_ends(base: BaseModel) -> list[int]:
    """Ids of the tokens at which generation stops, from the base's own files."""
    ids: list[int] = []
    for name in ("generation_config.json", "config.json"):
        file = base.path / name
        if file.is_file():
            found = json.loads(file.read_bytes()).get("eos_token_id")
            ids += found if isinstance(found, list) else [found] if isinstance(found, int) else []
    return ids


def _read(sources: Sequence[DataSource], beside: Path | None, skip_bad_rows: int) -> tuple[DataFile, ...]:
    files: list[DataFile] = []
    for source in sources:
        left = skip_bad_rows - sum(len(file.skipped) for file in files)
        files.append(read_source(source, beside=beside, skip_bad_rows=left))
    return tuple(files)


def _template(config: TrainConfig, tokenizer: Any, beside: Path | None) -> str | None:
    if config.chat_template == "jinja":
        written = config.chat_template_jinja or ""
        looks_like_a_path = "\n" not in written and "{" not in written
        if not looks_like_a_path:
            return written
        try:
            near = beside / written if beside else Path(written)
            return (near if near.is_file() else Path(written)).read_text(encoding="utf-8")
        except OSError as error:
            raise ConfigError(f"chat_template_jinja: {written} cannot be read", why=str(error.strerror)) from error
    if config.chat_template == "chatml":
        missing = [t for t in ("<|im_start|>", "<|im_end|>") if t not in tokenizer.get_vocab()]
        if missing:
            raise ConfigError(
                f"chat_template: the base has no token {missing[0]} for chatml",
                why="a new token needs a trained embedding, which the serving engine does not take",
                hint="use chat_template: jinja with tokens that the base has",
            )
        return CHATML
    template: str | dict[str, str] | None = tokenizer.chat_template
    return template.get("default") if isinstance(template, dict) else template


class _Rows(Sequence[Row]):
    """Rows of some files by place, none of them held in memory."""

    def __init__(self, files: Sequence[DataFile], places: Sequence[int] | None = None) -> None:
        self._files, self._starts = files, [0, *itertools.accumulate(len(file.rows) for file in files)]
        self._places = range(self._starts[-1]) if places is None else places

    def __len__(self) -> int:
        return len(self._places)

    @overload
    def __getitem__(self, i: int) -> Row: ...
    @overload
    def __getitem__(self, i: slice) -> Sequence[Row]: ...
    def __getitem__(self, i: int | slice) -> Row | Sequence[Row]:
        if isinstance(i, slice):
            return _Rows(self._files, self._places[i])
        place = self._places[i]
        file = bisect.bisect_right(self._starts, place) - 1
        return self._files[file].rows[place - self._starts[file]]


def _split(files: Sequence[DataFile], config: TrainConfig) -> tuple[Sequence[Row], Sequence[Row]]:
    """Shuffled, and the last ``val_set_size`` of them held out: a share below 1, a count from 1."""
    places = list(range(sum(len(file.rows) for file in files)))
    if config.shuffle_merged_datasets:
        random.Random(config.seed).shuffle(places)  # noqa: S311  not a secret
    size = config.val_set_size
    count = int(size) if size >= 1 else round(size * len(places))
    if count >= len(places):
        raise ConfigError(f"val_set_size {size:g} leaves nothing to train on", why=f"there are {len(places)} rows")
    rows = _Rows(files, places)
    return (rows[:-count], rows[-count:]) if count else (rows, ())


def _labelled(
    files: tuple[DataFile, ...], rows: Sequence[Row], labeler: Labeler, config: TrainConfig, limit: int
) -> Split:
    examples = [example for row in rows for example in labeler.examples(row, max_length=limit)]
    drop = config.excess_length_strategy == "drop"
    kept = [e for e in examples if not (e.truncated and (drop or not e.trained))]
    if not kept:
        raise DataError(
            f"no row of {', '.join(str(file.path) for file in files)} is left to train on",
            why=f"all {len(rows)} are longer than sequence_len {limit}"
            + ("" if drop else ", and cut to their prompts"),
            hint=f"raise sequence_len; the longest row has {max(e.length for e in examples)} tokens",
        )
    dropped = tuple(e.where for e in examples if e.truncated and (drop or not e.trained))
    return Split(files, tuple(kept), dropped, sum(e.truncated for e in kept))
