"""Everything that can be known before a weight is loaded: the data read, the labels made, the advice given."""

from __future__ import annotations

import bisect
import itertools
import random
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, overload

from adapterhub.base import BaseModel, find_base
from adapterhub.errors import ConfigError, DataError
from adapterhub.trainers import checks
from adapterhub.trainers.compared import judged, pairs
from adapterhub.trainers.config import DataSource, Method, TrainConfig
from adapterhub.trainers.data import DataFile, Judged, Pair, Preference, Row, read_source, with_system
from adapterhub.trainers.deepspeed import read_deepspeed
from adapterhub.trainers.ends import taught_end
from adapterhub.trainers.labels import Example, Labeler
from adapterhub.trainers.room import room, too_little
from adapterhub.trainers.start import FindVersion, Start, continued, find_start
from adapterhub.trainers.tokenizer import check_served_alike, generation_ends, load_tokenizer, template_of


@dataclass(frozen=True)
class Split:
    """Rows for one purpose, as the model will see them."""

    files: tuple[DataFile, ...]
    examples: tuple[Example, ...]  # one a row; of pairs two, the chosen answer and then the rejected one
    dropped: tuple[str, ...] = ()  # file:line of rows longer than sequence_len
    truncated: int = 0
    pairs: bool = False
    good: tuple[bool, ...] = ()  # of judged answers: whether it is one to give

    @property
    def rows(self) -> int:
        return len(self.examples) // 2 if self.pairs else len(self.examples)

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
    rows, held_out = _split(files, config)
    tests = _Rows(test_files)
    if config.dataset_exact_deduplication:
        tests = tests.distinct(seen=_Rows(files))
    train = _labelled(files, rows, labeler, config, limit)
    test_rows = held_out or tests
    evaluation = _labelled(test_files or files, test_rows, labeler, config, limit) if test_rows else None
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
    longest = max(len(example.input_ids) for example in train.examples)
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


class _Rows(Sequence[Row | Preference]):
    """Rows of some files by place, none of them held in memory."""

    def __init__(self, files: Sequence[DataFile], places: Sequence[int] | None = None) -> None:
        self._files, self._starts = files, [0, *itertools.accumulate(len(file.rows) for file in files)]
        self.places = range(self._starts[-1]) if places is None else places

    def __len__(self) -> int:
        return len(self.places)

    @overload
    def __getitem__(self, i: int) -> Row | Preference: ...
    @overload
    def __getitem__(self, i: slice) -> Sequence[Row | Preference]: ...
    def __getitem__(self, i: int | slice) -> Row | Preference | Sequence[Row | Preference]:
        if isinstance(i, slice):
            return _Rows(self._files, self.places[i])
        file, at = self._at(self.places[i])
        return file.rows[at]

    def distinct(self, *, seen: _Rows | None = None) -> _Rows:
        """Each row once, the first of its kind; ``seen``: none of these either."""
        texts = set(seen.texts()) if seen else set()
        kept = []
        for place, text in zip(self.places, self.texts(), strict=True):
            if text not in texts:
                texts.add(text)
                kept.append(place)
        return _Rows(self._files, kept)

    def texts(self) -> Iterator[bytes]:
        for place in self.places:
            file, at = self._at(place)
            yield file.rows.text(at)

    def _at(self, place: int) -> tuple[DataFile, int]:
        file = bisect.bisect_right(self._starts, place) - 1
        return self._files[file], place - self._starts[file]


def _split(
    files: Sequence[DataFile], config: TrainConfig
) -> tuple[Sequence[Row | Preference], Sequence[Row | Preference]]:
    """Shuffled, and the last ``val_set_size`` of them held out: a share below 1, a count from 1."""
    rows = _Rows(files).distinct() if config.dataset_exact_deduplication else _Rows(files)
    places = list(rows.places)
    if config.shuffle_merged_datasets:
        random.Random(config.seed).shuffle(places)  # noqa: S311  not a secret
    size = config.val_set_size
    count = int(size) if size >= 1 else round(size * len(places))
    if count >= len(places):
        raise ConfigError(f"val_set_size {size:g} leaves nothing to train on", why=f"there are {len(places)} rows")
    rows = _Rows(files, places)
    return (rows[:-count], rows[-count:]) if count else (rows, ())


def _labelled(
    files: tuple[DataFile, ...],
    rows: Sequence[Row | Preference],
    labeler: Labeler,
    config: TrainConfig,
    limit: int,
) -> Split:
    drop = config.excess_length_strategy == "drop"
    if config.rl is not None:
        return _compared(files, rows, labeler, config, limit)
    examples = [e for row in _told(rows, config) for e in labeler.examples(_plain(row), max_length=limit)]
    kept = [e for e in examples if not (e.truncated and (drop or not e.trained))]
    if not kept:
        raise _nothing_left(files, len(rows), limit, drop=drop, longest=max(e.length for e in examples))
    dropped = tuple(e.where for e in examples if e.truncated and (drop or not e.trained))
    return Split(files, tuple(kept), dropped, sum(e.truncated for e in kept))


def _compared(
    files: tuple[DataFile, ...],
    rows: Sequence[Row | Preference],
    labeler: Labeler,
    config: TrainConfig,
    limit: int,
) -> Split:
    drop, together = config.excess_length_strategy == "drop", config.rl != "kto"
    seed = config.seed if config.shuffle_merged_datasets else None
    if together:
        found = pairs(_told(rows, config), labeler, limit=limit, drop=drop)
    else:
        found = judged(_told(rows, config), labeler, limit=limit, drop=drop, seed=seed)
    if config.rl == "kto" and len(found.examples) == 1 and not found.dropped:
        raise DataError(
            f"{files[0].path} holds one answer",
            why="KTO measures each answer against another one",
            hint="add rows: some hundreds of good and of bad ones",
        )
    if not found.examples:
        raise _nothing_left(files, len(rows), limit, drop=drop, longest=found.longest)
    return Split(files, found.examples, found.dropped, found.truncated, pairs=together, good=found.good)


def _told(rows: Iterable[Row | Preference], config: TrainConfig) -> Iterator[Row | Preference]:
    """The rows with the system message that the config gives to those without one."""
    system = config.default_system_message
    return (with_system(row, system) if system else row for row in rows)


def _plain(row: Row | Preference) -> Row:
    assert not isinstance(row, Pair | Judged)
    return row


def _nothing_left(files: Sequence[DataFile], rows: int, limit: int, *, drop: bool, longest: int) -> DataError:
    return DataError(
        f"no row of {', '.join(str(file.path) for file in files)} is left to train on",
        why=f"all {rows} are longer than sequence_len {limit}" + ("" if drop else ", and cut to their prompts"),
        hint=f"raise sequence_len; the longest row has {longest} tokens",
    )
