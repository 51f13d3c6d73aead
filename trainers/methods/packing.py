"""Packing: several short rows in one of at most ``sequence_len`` tokens, each blind to the others.

What keeps them apart are the positions, which begin again at 0 with each row: flash attention finds the rows by them,
and for other kinds transformers makes a mask of blocks from them (`find_packed_sequence_indices`), unless `blocks` is
told where the rows begin. The first token of a row is never a label, because the token before it is another row's.
"""

from __future__ import annotations

import bisect
import itertools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from adapterhub.trainers.labels.examples import IGNORED, Example


def packs(examples: Sequence[Example], *, capacity: int) -> list[list[int]]:
    """Places of the examples that share a row: best fit, longest first. Each example stands in exactly one."""
    found: list[list[int]] = []
    room: list[tuple[int, int]] = []  # sorted: tokens left, place in `found`
    for place in sorted(range(len(examples)), key=lambda i: (-len(examples[i].input_ids), i)):
        length = len(examples[place].input_ids)
        at = bisect.bisect_left(room, (length, -1))
        if at < len(room):
            left, pack = room.pop(at)
        else:
            left, pack = capacity, len(found)
            found.append([])
        found[pack].append(place)
        bisect.insort(room, (left - length, pack))
    return found


def packed_row(examples: Sequence[Example]) -> dict[str, list[int]]:
    """One row for the trainer: ``input_ids``, ``labels`` and the lengths that it was made of."""
    return {
        "input_ids": [token for example in examples for token in example.input_ids],
        "labels": [label for example in examples for label in (IGNORED, *example.labels[1:])],
        "seq_lengths": [len(example.input_ids) for example in examples],
    }


def collator(*, pad: int, flat: bool) -> Callable[[Sequence[Mapping[str, Any]]], dict[str, Any]]:
    """Packed rows → a batch, without an attention mask. A row without ``seq_lengths`` is one of its own.

    Args:
        flat: those with ``seq_lengths`` all in one row of shape (1, tokens), and ``cu_seq_lens_q`` to say where the
            rows in it begin: flash attention knows blocks in one row only, and so does `blocks`. Otherwise (rows,
            longest): the other kinds compute all pairs of a row. What fills a row up stands after all that is trained
            on, so nothing sees it; its positions are 0.
    """
    import torch

    def collate(rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
        more = {}
        if flat and "seq_lengths" in rows[0]:
            rows = [{key: [value for row in rows for value in row[key]] for key in rows[0]}]
            begins = [0, *itertools.accumulate(rows[0]["seq_lengths"])]
            for begin in begins[:-1]:
                rows[0]["labels"][begin] = IGNORED
            more = {"cu_seq_lens_q": torch.tensor(begins, dtype=torch.int32)}
        lengths = [row.get("seq_lengths") or [len(row["input_ids"])] for row in rows]
        positions = [[i for length in together for i in range(length)] for together in lengths]
        columns = [(row["input_ids"], row["labels"], at) for row, at in zip(rows, positions, strict=True)]
        longest = max(len(ids) for ids, _, _ in columns)
        filled = [
            [[*values, *[fill] * (longest - len(values))] for values, fill in zip(row, (pad, IGNORED, 0), strict=True)]
            for row in columns
        ]
        ids, labels, at = (torch.tensor(column) for column in zip(*filled, strict=True))
        return {"input_ids": ids, "labels": labels, "position_ids": at, **more}

    return collate


def tokens_in(position_ids: Any) -> int:
    """Tokens of a batch, without what fills it up: zeros at the end, where no row of two tokens or more has one."""
    return int((position_ids.flip(1).cumsum(1) > 0).sum())
