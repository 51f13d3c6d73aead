"""Packed rows are blind to each other: each has the loss that it has alone."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from adapterhub.trainers.labels.examples import IGNORED, Example
from adapterhub.trainers.methods.packing import collator, packed_row, packs, tokens_in


def example(length: int, start: int = 0) -> Example:
    ids = [(start + 7 * i) % 90 + 3 for i in range(length)]
    return Example(ids, [IGNORED if i % 3 == 1 else token for i, token in enumerate(ids)], "rows.jsonl:1", length)


@given(st.lists(st.integers(2, 32), max_size=60))
def test_each_row_is_in_one_pack_and_no_pack_is_too_long(lengths: list[int]) -> None:
    examples = [example(length) for length in lengths]
    found = packs(examples, capacity=32)
    assert sorted(i for places in found for i in places) == list(range(len(lengths)))
    assert all(sum(lengths[i] for i in places) <= 32 for places in found)
    assert sum(sum(lengths[i] for i in places) <= 16 for places in found) <= 1  # two such would have been one


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("flat", [False, True])
def test_a_packed_batch_has_the_losses_of_its_rows_alone(tiny_base: Path, attention: str, flat: bool) -> None:
    torch = pytest.importorskip("torch")
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(tiny_base, dtype=torch.float32, attn_implementation=attention).eval()
    examples = [example(length, start) for start, length in enumerate((5, 11, 2, 8, 16))]
    groups = [[0, 1], [2, 3, 4]]
    batch = collator(pad=0, flat=flat)([packed_row([examples[i] for i in group]) for group in groups])
    assert tokens_in(batch["position_ids"]) == sum(e.length for e in examples)
    assert batch["input_ids"].shape == ((1, 42) if flat else (2, 26))
    with torch.no_grad():
        together = _losses(
            model(input_ids=batch["input_ids"], position_ids=batch["position_ids"], use_cache=False), batch
        )
        alone = [
            _losses(model(input_ids=torch.tensor([e.input_ids])), {"labels": torch.tensor([e.labels])})
            for e in examples
        ]
    assert len(together) == sum(map(len, alone))
    torch.testing.assert_close(together, torch.cat(alone), atol=1e-5, rtol=1e-5)


def _losses(output: Any, batch: dict[str, Any]) -> Any:
    """Of each label, in the order of the rows."""
    import torch

    labels = batch["labels"][:, 1:].flatten()
    losses = torch.nn.functional.cross_entropy(output.logits[:, :-1].flatten(0, 1), labels, reduction="none")
    return losses[labels != IGNORED]


def test_the_first_token_of_a_row_is_no_label() -> None:
    rows: Sequence[Example] = [example(4), example(5)]
    row = packed_row(rows)
    assert row["seq_lengths"] == [4, 5]
    assert (row["labels"][0], row["labels"][4]) == (IGNORED, IGNORED)
    assert row["labels"][2:4] == rows[0].labels[2:]
