"""Labelled rows in flat arrays: Python's own integers take about ten times as much memory, for all rows at once."""

from __future__ import annotations

from array import array
from collections.abc import Iterable, Sequence
from typing import Any, overload

from adapterhub.trainers.labels.labels import Example


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
    def __getitem__(self, i: slice) -> Sequence[Example]: ...
    def __getitem__(self, i: int | slice) -> Example | Sequence[Example]:
        if isinstance(i, slice):
            return [self[k] for k in range(*i.indices(len(self)))]
        at = range(len(self))[i]  # also from the end, and IndexError
        part = slice(self._starts[at], self._starts[at + 1])
        return Example(self._ids[part].tolist(), self._labels[part].tolist(), self._where[at], self._lengths[at])

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
