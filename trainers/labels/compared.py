"""Preference rows as the model will see them: two labelled answers a row, or one and whether it is good."""

from __future__ import annotations

import random
from collections.abc import Iterable
from dataclasses import dataclass

from adapterhub.trainers.data import Judged, Pair, Preference, Row
from adapterhub.trainers.labels.labels import Example, Labeler


@dataclass(frozen=True)
class Compared:
    """Labelled answers. Of pairs the chosen and the rejected one stand side by side, in this order."""

    examples: tuple[Example, ...]
    good: tuple[bool, ...] = ()  # of judged answers, one each
    dropped: tuple[str, ...] = ()  # file:line
    truncated: int = 0
    longest: int = 0  # tokens, before truncation


def pairs(rows: Iterable[Row | Preference], labeler: Labeler, *, limit: int, drop: bool) -> Compared:
    """Two examples a row. A pair of which one answer is too long is dropped whole.

    Args:
        limit: tokens of an answer with its prompt.
        drop: answers that are longer are left out; otherwise cut, and left out where nothing differs any more.
    """
    kept: list[Example] = []
    dropped, truncated, longest = [], 0, 0
    for row in rows:
        assert isinstance(row, Pair)
        sides = [labeler.label(side, max_length=limit) for side in (row.chosen, row.rejected)]
        longest = max(longest, *(side.length for side in sides))
        same = sides[0].input_ids == sides[1].input_ids
        if same or any(side.truncated and (drop or not side.trained) for side in sides):
            dropped.append(row.where)
        else:
            kept += sides
            truncated += any(side.truncated for side in sides)
    return Compared(tuple(kept), (), tuple(dropped), truncated, longest)


def judged(rows: Iterable[Row | Preference], labeler: Labeler, *, limit: int, drop: bool, seed: int | None) -> Compared:
    """One example an answer; a pair is a good and a bad one.

    Args:
        seed: shuffles the answers again, so that the two of a pair do not stand side by side, where each would be
            measured against an answer to its own prompt; None: as they come.
    """
    found, paired = [], False
    for row in rows:
        paired = paired or isinstance(row, Pair)
        found += [(labeler.label(answer, max_length=limit), good) for answer, good in _answers(row)]
    longest = max((example.length for example, _ in found), default=0)
    left = [(e, good) for e, good in found if not (e.truncated and (drop or not e.trained))]
    dropped = tuple(e.where for e, _ in found if e.truncated and (drop or not e.trained))
    if seed is not None and paired:
        random.Random(seed).shuffle(left)  # noqa: S311  not a secret
    return Compared(
        tuple(e for e, _ in left), tuple(g for _, g in left), dropped, sum(e.truncated for e, _ in left), longest
    )


def _answers(row: Row | Preference) -> list[tuple[Row, bool]]:
    if isinstance(row, Pair):
        return [(row.chosen, True), (row.rejected, False)]
    assert isinstance(row, Judged)
    return [(row.answer, row.good)]
