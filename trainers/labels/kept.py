"""Labelled rows that fit: of supervised rows one each, of preferences two answers, or one and whether it is good."""

from __future__ import annotations

import random
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from adapterhub.trainers.data import Judged, Pair, Preference, Row
from adapterhub.trainers.labels.examples import Example, Examples
from adapterhub.trainers.labels.labels import Labeler


@dataclass(frozen=True)
class Kept:
    """Labelled rows. Of pairs the chosen and the rejected answer stand side by side, in this order."""

    examples: Examples
    dropped: tuple[str, ...] = ()  # file:line
    truncated: int = 0
    longest: int = 0  # tokens, before truncation
    good: tuple[bool, ...] = ()  # of judged answers, one each


def supervised(rows: Iterable[Row | Preference], labeler: Labeler, *, limit: int, drop: bool) -> Kept:
    """One example a row, or several of running text.

    Args:
        limit: tokens of a row.
        drop: rows that are longer are left out; otherwise cut, and left out where no trained token is left.
    """
    kept = Examples()
    dropped, truncated, longest = [], 0, 0
    for example in labeler.examples((_plain(row) for row in rows), max_length=limit):
        longest = max(longest, example.length)
        if _unfit(example, drop):
            dropped.append(example.where)
        else:
            kept.append(example)
            truncated += example.truncated
    return Kept(kept, tuple(dropped), truncated, longest)


def pairs(rows: Iterable[Row | Preference], labeler: Labeler, *, limit: int, drop: bool) -> Kept:
    """Two examples a row. A pair goes whole where one answer is unfit, or both are alike once cut."""
    kept = Examples()
    dropped, truncated, longest = [], 0, 0
    answers = labeler.label_all(_sides(rows), max_length=limit)
    for chosen, rejected in zip(answers, answers, strict=True):
        longest = max(longest, chosen.length, rejected.length)
        if chosen.input_ids == rejected.input_ids or _unfit(chosen, drop) or _unfit(rejected, drop):
            dropped.append(chosen.where)
        else:
            kept.append(chosen)
            kept.append(rejected)
            truncated += chosen.truncated or rejected.truncated
    return Kept(kept, tuple(dropped), truncated, longest)


def judged(rows: Iterable[Row | Preference], labeler: Labeler, *, limit: int, drop: bool, seed: int | None) -> Kept:
    """One example an answer; a pair is a good and a bad one.

    Args:
        seed: shuffles the answers again, so that the two of a pair do not stand side by side, where each would be
            measured against an answer to its own prompt; None: as they come.
    """
    good: list[bool] = []
    paired = False

    def answers() -> Iterator[Row]:
        nonlocal paired
        for row in rows:
            paired = paired or isinstance(row, Pair)
            for answer, is_good in _answers(row):
                good.append(is_good)
                yield answer

    found = Examples(labeler.label_all(answers(), max_length=limit))
    places = [i for i, example in enumerate(found) if not _unfit(example, drop)]
    fit = set(places)
    if seed is not None and paired:
        random.Random(seed).shuffle(places)  # noqa: S311  not a secret
    return Kept(
        Examples(found[i] for i in places),
        tuple(example.where for i, example in enumerate(found) if i not in fit),
        sum(found[i].truncated for i in places),
        max((example.length for example in found), default=0),
        tuple(good[i] for i in places),
    )


def _unfit(example: Example, drop: bool) -> bool:
    return example.truncated and (drop or not example.trained)


def _plain(row: Row | Preference) -> Row:
    assert not isinstance(row, Pair | Judged)
    return row


def _sides(rows: Iterable[Row | Preference]) -> Iterator[Row]:
    for row in rows:
        assert isinstance(row, Pair)
        yield from (row.chosen, row.rejected)


def _answers(row: Row | Preference) -> list[tuple[Row, bool]]:
    if isinstance(row, Pair):
        return [(row.chosen, True), (row.rejected, False)]
    assert isinstance(row, Judged)
    return [(row.answer, row.good)]
