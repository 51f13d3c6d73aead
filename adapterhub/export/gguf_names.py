"""What GGUF calls things: architectures, hyperparameters and tensors, as llama.cpp reads them. No torch.

llama.cpp turns neighbouring pairs of a head's dimensions (Llama, Mistral) where transformers turns the first half
against the second: there the rows of the query and key weights are put in another order. Qwen keeps that of
transformers.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from typing import Any

import numpy as np
import numpy.typing as npt

from adapterhub.errors import MissingDependency, Unsupported
from adapterhub.export import gguf_gemma as gemma
from adapterhub.export.tuned import rope
from adapterhub.names import tied

Array = npt.NDArray[Any]
Value = int | float | str | bool

TYPES = ("f32", "f16", "bf16", "q8_0")
Q8_BLOCK = 32  # values under one scale; a row is made of whole blocks

_ARCHITECTURES = {"llama": "llama", "mistral": "llama", "qwen2": "qwen2", "qwen3": "qwen3", **gemma.KINDS}
_ROTATED = re.compile(r"blk\.\d+\.attn_(?P<which>q|k)\.(?:weight|bias)")
_SKIPPED = re.compile(r".*\.rotary_emb\.inv_freq")  # a buffer that old checkpoints carry; the config says the same


@dataclass(frozen=True)
class Architecture:
    """A model as llama.cpp names it."""

    name: str  # general.architecture
    config: Mapping[str, Any]

    @property
    def heads(self) -> int:
        return int(self.config["num_attention_heads"])

    @property
    def key_heads(self) -> int:
        return int(self.config.get("num_key_value_heads") or self.heads)

    @property
    def head_size(self) -> int:
        return int(self.config.get("head_dim") or self.config["hidden_size"] // self.heads)

    @property
    def tied(self) -> bool:
        return tied(self.config)

    @property
    def rotation(self) -> dict[str, Any]:
        """The rotary settings."""
        return gemma.rotation(self.config) if gemma.is_gemma(self.name) else rope(self.config)

    def tensor(self, name: str) -> str | None:
        """The checkpoint's name → GGUF's; None for what GGUF does not store. Raises Unsupported."""
        if _SKIPPED.fullmatch(name) or (self.tied and name == "lm_head.weight"):
            return None
        names = _names(self.name, int(self.config["num_hidden_layers"]))
        found = names.get_name(name, try_suffixes=(".weight", ".bias"))
        if found is None:
            raise Unsupported(f"{name} has no place in a GGUF file", why=f"llama.cpp's {self.name} has no such tensor")
        return str(found)

    def stored(self, name: str, values: Array) -> Array:
        """A tensor as llama.cpp stores it; ``name`` is GGUF's."""
        if gemma.is_gemma(self.name) and name.endswith("norm.weight"):
            return values + np.float32(1)
        return self.reorder(name, values)

    def reorder(self, name: str, values: Array) -> Array:
        """The rows of a tensor in llama.cpp's order; ``name`` is GGUF's, rows are outputs of the layer."""
        found = _ROTATED.fullmatch(name)
        if self.name != "llama" or found is None:
            return values
        heads = self.heads if found["which"] == "q" else self.key_heads
        halves = values.reshape(heads, 2, len(values) // heads // 2, *values.shape[1:])
        return halves.swapaxes(1, 2).reshape(values.shape)


def architecture(config: Mapping[str, Any]) -> Architecture:
    """Raises Unsupported: llama.cpp has no such model, or computes it differently; MissingDependency."""
    require_gguf()
    kind = str(config.get("model_type"))
    if kind in _ARCHITECTURES:
        found = Architecture(_ARCHITECTURES[kind], config)
        why = _why_not(found)
    else:
        why = f"{kind} models are not converted here; {', '.join(sorted(_ARCHITECTURES))} are"
    if why:
        raise Unsupported(
            "the model cannot be written as GGUF", why=why, hint="leave out --format, and convert the merged model"
        )
    return found


def _why_not(arch: Architecture) -> str:
    scaling = str(arch.rotation["rope_type"])
    if scaling not in {"default", "llama3", "linear"}:
        return f"rotary scaling {scaling} is not converted here"
    if gemma.is_gemma(arch.name):
        return gemma.why_not(arch.name, arch.config)
    activation = arch.config.get("hidden_act", "silu")
    return "" if activation == "silu" else f"hidden_act is {activation}, llama.cpp computes silu"


def require_gguf() -> None:
    """Raises MissingDependency."""
    from importlib.util import find_spec

    if find_spec("gguf") is None:
        raise MissingDependency("writing GGUF needs the package gguf", hint="pip install 'adapterhub[gguf]'")


def hyperparameters(arch: Architecture) -> dict[str, Value]:
    """What llama.cpp must know beside the tensors, without the architecture before each key."""
    config, settings = arch.config, arch.rotation
    values: dict[str, Value] = {
        "block_count": int(config["num_hidden_layers"]),
        "context_length": _context(config),
        "embedding_length": int(config["hidden_size"]),
        "feed_forward_length": int(config["intermediate_size"]),
        "attention.head_count": arch.heads,
        "attention.head_count_kv": arch.key_heads,
        "attention.key_length": arch.head_size,
        "attention.value_length": arch.head_size,
        "attention.layer_norm_rms_epsilon": float(config["rms_norm_eps"]),
        "rope.freq_base": float(settings["rope_theta"]),
        "rope.dimension_count": arch.head_size,
        "vocab_size": int(config["vocab_size"]),
    }
    if settings["rope_type"] == "linear":
        values |= {"rope.scaling.type": "linear", "rope.scaling.factor": float(settings["factor"])}
    return values | (gemma.settings(arch.name, config) if gemma.is_gemma(arch.name) else {})


def rope_factors(arch: Architecture) -> Array | None:
    """By what Llama 3.1's scaling divides each frequency, (head size / 2,) float32: the tensor ``rope_freqs.weight``.

    Long waves are stretched by ``factor``, short ones not, and between the two it is interpolated.
    """
    settings = arch.rotation
    if settings["rope_type"] != "llama3":
        return None
    factor, low, high = (float(settings[key]) for key in ("factor", "low_freq_factor", "high_freq_factor"))
    trained = float(settings["original_max_position_embeddings"])
    exponents = np.arange(0, arch.head_size, 2) / arch.head_size
    waves = 2 * math.pi * float(settings["rope_theta"]) ** exponents
    smooth = np.clip((trained / waves - low) / (high - low), 0, 1)
    return (1 / ((1 - smooth) / factor + smooth)).astype("<f4")


@cache
def _names(arch: str, layers: int) -> Any:
    import gguf

    return gguf.get_tensor_name_map(gguf.MODEL_ARCH[arch.upper()], layers)


def _context(config: Mapping[str, Any]) -> int:
    """llama.cpp attends to everything in these architectures: it is right up to the end of the sliding window."""
    longest, window = int(config["max_position_embeddings"]), config.get("sliding_window")
    if window is None or not config.get("use_sliding_window", config.get("model_type") == "mistral"):
        return longest
    return min(longest, int(window))
