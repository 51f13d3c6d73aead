"""Packed rows are blind to each other: each has the loss that it has alone."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from adapterhub.errors import ConfigError
from adapterhub.trainers.labels.examples import IGNORED, Example
from adapterhub.trainers.methods.blocks import takes_blocks, use_blocks
from adapterhub.trainers.methods.packing import collator, packed_row, packs, tokens_in
from adapterhub.trainers.methods.sft import sft_trainer
from tests.trainers.conftest import begin

Writer = Callable[..., Path]


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


@pytest.mark.parametrize("family", ["llama", "mistral", "gemma2", "qwen3", "phi3"])
def test_rows_in_one_without_a_mask_have_the_losses_and_gradients_that_they_have_alone(family: str) -> None:
    """Of bases with a sliding window too, shorter than most rows."""
    torch = pytest.importorskip("torch")
    from transformers import AutoConfig, AutoModelForCausalLM

    torch.manual_seed(0)
    config = AutoConfig.for_model(
        family, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
        head_dim=8, vocab_size=100, sliding_window=5, pad_token_id=0, bos_token_id=1, eos_token_id=2,
    )  # fmt: skip
    model = AutoModelForCausalLM.from_config(config, attn_implementation="sdpa", dtype=torch.float32)
    if not takes_blocks(model):
        pytest.skip("a GPU has kernels of its own")
    examples = [example(length, start) for start, length in enumerate((5, 11, 2, 8, 16))]
    alone = [
        _losses(model(input_ids=torch.tensor([e.input_ids])), {"labels": torch.tensor([e.labels])}) for e in examples
    ]
    torch.cat(alone).sum().backward()
    expected = [parameter.grad.clone() for parameter in model.parameters()]
    model.zero_grad()
    use_blocks(model)
    batch = collator(pad=0, flat=True)([packed_row(examples[:2]), packed_row(examples[2:])])
    inputs = {key: value for key, value in batch.items() if key != "labels"}
    together = _losses(model(**inputs, use_cache=False), batch)
    together.sum().backward()
    torch.testing.assert_close(together, torch.cat(alone), atol=1e-5, rtol=1e-5)
    torch.testing.assert_close([parameter.grad for parameter in model.parameters()], expected, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize(("family", "why"), [("mamba", "a state"), ("gpt_neox_japanese", "attention of its own")])
def test_a_base_whose_rows_would_see_each_other_keeps_its_own_way(family: str, why: str) -> None:
    pytest.importorskip("torch")
    from transformers import AutoConfig, AutoModelForCausalLM

    config = AutoConfig.for_model(family, hidden_size=32, num_hidden_layers=1, vocab_size=100)
    assert not takes_blocks(AutoModelForCausalLM.from_config(config))


def test_a_base_with_a_state_is_not_packed_for(write_config: Writer) -> None:
    pytest.importorskip("torch")
    from transformers import AutoConfig, AutoModelForCausalLM

    _, prepared = begin(write_config(sample_packing=True))
    config = AutoConfig.for_model("mamba", hidden_size=32, num_hidden_layers=1, vocab_size=100)
    with pytest.raises(ConfigError, match="sample_packing: the base tiny-llama has a state"):
        sft_trainer(prepared, model=AutoModelForCausalLM.from_config(config), arguments={}, callbacks=[])


def test_rows_that_are_laid_flat_predict_nothing_across_their_borders() -> None:
    pytest.importorskip("torch")
    rows = [{"input_ids": [5, 6, 7], "labels": [5, 6, 7], "seq_lengths": [3]} for _ in range(2)]
    batch = collator(pad=0, flat=True)(rows)
    assert batch["labels"].tolist() == [[IGNORED, 6, 7, IGNORED, 6, 7]]
    assert batch["cu_seq_lens_q"].tolist() == [0, 3, 6]
    padded = collator(pad=0, flat=True)([{"input_ids": [5] * n, "labels": [5] * n} for n in (2, 3)])
    assert padded["position_ids"].tolist() == [[0, 1, 0], [0, 1, 2]]
    assert "cu_seq_lens_q" not in padded


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
