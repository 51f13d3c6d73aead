"""The rows of a training and of its evaluation: put together, shuffled, divided, and labelled."""

from __future__ import annotations

import bisect
import itertools
import random
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import overload

from adapterhub.errors import ConfigError, DataError
from adapterhub.trainers.config import TrainConfig
from adapterhub.trainers.data import DataFile, Preference, Row, with_system
from adapterhub.trainers.labels.examples import Examples
from adapterhub.trainers.labels.kept import Kept, judged, pairs, supervised
from adapterhub.trainers.labels.labels import Labeler


@dataclass(frozen=True)
class Split:
    """Rows for one purpose, as the model will see them."""

    files: tuple[DataFile, ...]
    examples: Examples  # one a row; of pairs two, the chosen answer and then the rejected one
    dropped: tuple[str, ...] = ()  # file:line of rows longer than sequence_len
    truncated: int = 0
    pairs: bool = False
    good: tuple[bool, ...] = ()  # of judged answers: whether it is one to give

    @property
    def rows(self) -> int:
        return len(self.examples) // 2 if self.pairs else len(self.examples)

    @property
    def tokens(self) -> int:
        return self.examples.tokens

    @property
    def trained_tokens(self) -> int:
        return self.examples.trained


class Rows(Sequence[Row | Preference]):
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
            return Rows(self._files, self.places[i])
        file, at = self._at(self.places[i])
        return file.rows[at]

    def distinct(self, *, seen: Rows | None = None) -> Rows:
        """Each row once, the first of its kind; ``seen``: none of these either."""
        texts = set(seen.texts()) if seen else set()
        kept = []
        for place, text in zip(self.places, self.texts(), strict=True):
            if text not in texts:
                texts.add(text)
                kept.append(place)
        return Rows(self._files, kept)

    def texts(self) -> Iterator[bytes]:
        for place in self.places:
            file, at = self._at(place)
            yield file.rows.text(at)

    def _at(self, place: int) -> tuple[DataFile, int]:
        file = bisect.bisect_right(self._starts, place) - 1
        return self._files[file], place - self._starts[file]


def divided(
    files: Sequence[DataFile], config: TrainConfig
) -> tuple[Sequence[Row | Preference], Sequence[Row | Preference]]:
    """Shuffled, and the last ``val_set_size`` of them held out: a share below 1, a count from 1."""
    rows = Rows(files).distinct() if config.dataset_exact_deduplication else Rows(files)
    places = list(rows.places)
    if config.shuffle_merged_datasets:
        random.Random(config.seed).shuffle(places)  # noqa: S311  not a secret
    size = config.val_set_size
    count = int(size) if size >= 1 else round(size * len(places))
    if count >= len(places):
        raise ConfigError(f"val_set_size {size:g} leaves nothing to train on", why=f"there are {len(places)} rows")
    rows = Rows(files, places)
    return (rows[:-count], rows[-count:]) if count else (rows, ())


def labelled(
    files: tuple[DataFile, ...],
    rows: Sequence[Row | Preference],
    labeler: Labeler,
    config: TrainConfig,
    limit: int,
) -> Split:
    """The rows as the method wants them, none longer than ``limit`` tokens. Raises DataError: none is left."""
    drop = config.excess_length_strategy == "drop"
    found = _kept(_told(rows, config), labeler, config, limit=limit, drop=drop)
    if config.rl == "kto" and len(found.examples) == 1 and not found.dropped:
        raise DataError(
            f"{files[0].path} holds one answer",
            why="KTO measures each answer against another one",
            hint="add rows: some hundreds of good and of bad ones",
        )
    if not found.examples:
        raise DataError(
            f"no row of {', '.join(str(file.path) for file in files)} is left to train on",
            why=f"all {len(rows)} are longer than sequence_len {limit}"
            + ("" if drop else ", and cut to their prompts"),
            hint=f"raise sequence_len; the longest row has {found.longest} tokens",
        )
    paired = config.rl not in (None, "kto")
    return Split(files, found.examples, found.dropped, found.truncated, pairs=paired, good=found.good)


def _kept(rows: Iterable[Row | Preference], labeler: Labeler, config: TrainConfig, *, limit: int, drop: bool) -> Kept:
    if config.rl == "kto":
        seed = config.seed if config.shuffle_merged_datasets else None
        return judged(rows, labeler, limit=limit, drop=drop, seed=seed)
    return (pairs if config.rl else supervised)(rows, labeler, limit=limit, drop=drop)


def _told(rows: Iterable[Row | Preference], config: TrainConfig) -> Iterator[Row | Preference]:
    """The rows with the system message that the config gives to those without one."""
    system = config.default_system_message
    return (with_system(row, system) if system else row for row in rows)
