"""Attention within the rows of a flat batch, for CPUs: each row is a product of its own.

Rows that stand one behind the other in a batch of shape (1, tokens) need no padding. GPUs have kernels for that (flash
attention); with transformers' sdpa a CPU computes all pairs of tokens and masks most of them away. Here each row is
one causal call without a mask, which costs what the row alone would.
"""

from __future__ import annotations

from typing import Any

NAME = "adapterhub_blocks"  # of the attention, as transformers' `AttentionInterface` knows it


def takes_blocks(model: Any) -> bool:
    """Whether the base can compute so: attention is all its memory, exchangeable, and causal within windows at most."""
    import torch

    base = base_of(model)
    config = base.config.get_text_config()
    return (
        not torch.cuda.is_available()
        and base.config._attn_implementation == "sdpa"
        and base._supports_attention_backend
        and base._supports_flash_attn  # what it leaves out is said in its words, not in a mask
        and not base._is_stateful  # a state space runs through all rows
        and not getattr(config, "attention_chunk_size", None)
    )


def use_blocks(model: Any) -> None:
    from transformers import AttentionInterface

    AttentionInterface.register(NAME, attend)
    base_of(model).set_attn_implementation(NAME)


def attend(
    module: Any,
    query: Any,
    key: Any,
    value: Any,
    attention_mask: Any,
    *,
    cu_seq_lens_q: Any = None,
    sliding_window: int | None = None,
    **options: Any,
) -> tuple[Any, None]:
    """transformers' sdpa, row by row.

    Args:
        query: of shape (batch, heads, tokens, size), as ``key`` and ``value``, which may have fewer heads.
        cu_seq_lens_q: where the rows begin, and the last one's end, of shape (rows + 1,); None: each of the batch is
            one row, and what fills it up stands at its end.
        sliding_window: tokens that a token sees, its own among them; None: all before it.
    """
    import torch
    from transformers.integrations.sdpa_attention import sdpa_attention_forward

    assert attention_mask is None  # no mask is made for an attention of this name
    lengths = [query.shape[2]] if cu_seq_lens_q is None else cu_seq_lens_q.diff().tolist()
    rows = zip(*(tensor.split(lengths, dim=2) for tensor in (query, key, value)), strict=True)
    found = [
        sdpa_attention_forward(module, *row, _window(length, sliding_window), **options)[0]
        for length, row in zip(lengths, rows, strict=True)
    ]
    return torch.cat(found, dim=1), None


def _window(length: int, window: int | None) -> Any:
    """What each token of a row sees, of shape (1, 1, length, length); None where that is all before it."""
    import torch

    if not window or length <= window:
        return None
    at = torch.arange(length)
    distance = at[:, None] - at
    return ((distance >= 0) & (distance < window))[None, None]


def base_of(model: Any) -> Any:
    """The model without what PEFT put around it."""
    return model.get_base_model() if hasattr(model, "get_base_model") else model
