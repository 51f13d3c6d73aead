"""A labelled row, and all of them in flat arrays: Python's own integers take about ten times as much memory."""

from __future__ import annotations

import itertools
from array import array
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, overload

IGNORED = -100  # the label of a token that is not trained on


@dataclass(frozen=True)
class Example:
    """One row as the model sees it. ``labels`` are the ids, or `IGNORED`; both have the same length."""

    input_ids: list[int]
    labels: list[int]
    where: str  # file:line
    length: int  # tokens before truncation

    @property
    def truncated(self) -> bool:
        return self.length > len(self.input_ids)

    @property
    def trained(self) -> int:
        """Tokens that are trained on."""
        return len(self.labels) - self.labels.count(IGNORED)

    def to_last_trained(self) -> Example:
        """Without what follows the last trained token, as if it had never been there."""
        end = len(self.labels)
        while end and self.labels[end - 1] == IGNORED:
            end -= 1
        return self if end == len(self.labels) else Example(self.input_ids[:end], self.labels[:end], self.where, end)

    def cut(self, limit: int | None) -> Example:
        """Its first ``limit`` tokens."""
        if limit is None or len(self.input_ids) <= limit:
            return self
        return Example(self.input_ids[:limit], self.labels[:limit], self.where, self.length)

    def parts(self, limit: int) -> list[Example]:
        """Several of about the same length, none longer than ``limit`` tokens."""
        count = -(-self.length // limit)
        cuts = [self.length * k // count for k in range(count + 1)]
        return [
            Example(self.input_ids[a:b], self.labels[a:b], self.where, length=b - a)
            for a, b in itertools.pairwise(cuts)
        ]


class Examples(Sequence[Example]):
    """Examples that are put together again when they are asked for. Append only."""

    def __init__(self, examples: Iterable[Example] = ()) -> None:
        self._ids, self._labels = array("i"), array("i")
        self._starts, self._lengths = array("q", [0]), array("q")
        self._where: list[str] = []
        for example in examples:
            self.append(example)

    def append(self, example: Example) -> None:
        self._ids.extend(example.input_ids)
        self._labels.extend(example.labels)
        self._starts.append(len(self._ids))
        self._lengths.append(example.length)
        self._where.append(example.where)

    def __len__(self) -> int:
        return len(self._where)

    @overload
    def __getitem__(self, i: int) -> Example: ...
    @overload
    def __getitem__(self, i: slice) -> Examples: ...
    def __getitem__(self, i: int | slice) -> Example | Examples:
        if isinstance(i, slice):
            return Examples(self[k] for k in range(*i.indices(len(self))))
        at = range(len(self))[i]  # also from the end, and IndexError
        part = slice(self._starts[at], self._starts[at + 1])
        return Example(self._ids[part].tolist(), self._labels[part].tolist(), self._where[at], self._lengths[at])

    @property
    def lengths(self) -> list[int]:
        """Tokens of each."""
        return [end - start for start, end in itertools.pairwise(self._starts)]

    @property
    def tokens(self) -> int:
        return len(self._ids)

    @property
    def trained(self) -> int:
        """Tokens that are trained on."""
        return len(self._labels) - self._labels.count(IGNORED)

    def columns(self) -> dict[str, Any]:
        """``input_ids`` and ``labels`` as Arrow's lists of int32, without a copy as Python's lists."""
        import numpy as np
        import pyarrow as pa

        starts = pa.array(np.frombuffer(self._starts, dtype=np.int64).astype(np.int32))
        flat = {"input_ids": self._ids, "labels": self._labels}
        return {
            name: pa.ListArray.from_arrays(starts, pa.array(np.frombuffer(values, dtype=np.int32)))
            for name, values in flat.items()
        }
