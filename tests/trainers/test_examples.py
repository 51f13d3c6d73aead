"""Labelled rows in flat arrays are the rows that were put in."""

from __future__ import annotations

import sys

import pytest

from adapterhub.trainers.labels.examples import IGNORED, Example, Examples

ROWS = [
    Example([5, 6, 7], [IGNORED, 6, 7], "a.jsonl:1", 3),
    Example([200_000], [200_000], "a.jsonl:2", 9),
    Example([1, 2], [IGNORED, 2], "a.jsonl:4", 2),
]


def test_what_was_put_in_comes_out() -> None:
    found = Examples(ROWS)
    assert list(found) == ROWS
    assert (found[-1], found[1].truncated, len(found)) == (ROWS[2], True, 3)
    assert list(found[::2]) == ROWS[::2]
    assert list(found[:None]) == ROWS
    assert not Examples()
    with pytest.raises(IndexError):
        found[3]


def test_columns_are_the_same_lists() -> None:
    columns = Examples(ROWS).columns()
    assert columns["input_ids"].to_pylist() == [row.input_ids for row in ROWS]
    assert columns["labels"].to_pylist() == [row.labels for row in ROWS]
    assert Examples().columns()["labels"].to_pylist() == []


def test_a_token_takes_eight_bytes() -> None:
    found = Examples(Example(list(range(1000, 2000)), list(range(1000, 2000)), "a.jsonl:1", 1000) for _ in range(50))
    held = sum(sys.getsizeof(values) for values in (found._ids, found._labels))
    assert held < 50_000 * 8 * 1.3
