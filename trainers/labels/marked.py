"""Texts with what is trained on marked in them → token ids and labels, many at once.

A fast tokenizer takes a list of texts on all cores and gives the interpreter back meanwhile; one by one, the calls
themselves are half of its time.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

from adapterhub.trainers.labels.examples import IGNORED, Example

_TOGETHER = 2**18  # characters that are tokenised at once; their offsets take about 20 MB

_Row = TypeVar("_Row")


@dataclass(frozen=True)
class Marked:
    """A row as text. ``spans``: characters that are trained on, in order and apart."""

    text: str
    spans: tuple[tuple[int, int], ...]
    where: str  # file:line
    special_tokens: bool  # the tokenizer adds its own at the ends


def examples_of(rows: Iterable[tuple[_Row, Marked | Example]], tokenizer: Any) -> Iterator[tuple[_Row, Example]]:
    """Each row beside its example, in order; an example passes as it is."""
    waiting: list[tuple[_Row, Marked | Example]] = []
    size = 0
    for row, marked in rows:
        waiting.append((row, marked))
        size += len(marked.text) if isinstance(marked, Marked) else len(marked.input_ids)
        if size >= _TOGETHER:
            yield from _tokenised(waiting, tokenizer)
            waiting, size = [], 0
    yield from _tokenised(waiting, tokenizer)


def _tokenised(rows: Sequence[tuple[_Row, Marked | Example]], tokenizer: Any) -> Iterator[tuple[_Row, Example]]:
    found = {
        special: iter(
            _labelled([m for _, m in rows if isinstance(m, Marked) and m.special_tokens == special], tokenizer)
        )
        for special in (False, True)
    }
    for row, marked in rows:
        yield row, marked if isinstance(marked, Example) else next(found[marked.special_tokens])


def _labelled(texts: Sequence[Marked], tokenizer: Any) -> Iterator[Example]:
    if not texts:
        return
    encoded = tokenizer(
        [marked.text for marked in texts],
        add_special_tokens=texts[0].special_tokens,
        return_offsets_mapping=True,
        return_attention_mask=False,
        return_token_type_ids=False,
        verbose=False,
    )
    for marked, ids, offsets in zip(texts, encoded["input_ids"], encoded["offset_mapping"], strict=True):
        labels = _labels(ids, offsets, marked.spans)
        yield Example(ids, labels, marked.where, len(ids)).to_last_trained()


def _labels(ids: list[int], offsets: list[tuple[int, int]], spans: Sequence[tuple[int, int]]) -> list[int]:
    """A token is trained on if it overlaps a span."""
    import numpy as np

    places = np.fromiter(itertools.chain.from_iterable(offsets), dtype=np.int64, count=2 * len(ids))
    starts, ends = places[::2], places[1::2]
    starts = starts - (starts == ends)  # byte-level tokenizers trim blanks: an empty one stands for the blank before it
    trained = np.zeros(len(ids), dtype=bool)
    for start, end in spans:
        trained |= (ends > start) & (starts < end)
    trained &= starts >= 0
    labels: list[int] = np.where(trained, ids, IGNORED).tolist()
    return labels
