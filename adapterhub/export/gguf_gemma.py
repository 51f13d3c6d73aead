"""What is special about Gemma 1 to 3 (text) in llama.cpp, and what of it a config may not say otherwise.

Norms are stored with the 1 added that the model adds to them. Which layers attend to a window, and by what queries are
divided, llama.cpp knows by itself, so a config that says something else is refused. The head is always the embedding.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from adapterhub.export.tuned import rope

KINDS = {"gemma": "gemma", "gemma2": "gemma2", "gemma3_text": "gemma3"}  # model_type → llama.cpp's name

_PERIOD = {"gemma2": 2, "gemma3": 6}  # the last layer of each attends to everything, the others to a window
_DIVIDED_BY_WIDTH = {"gemma2": 46, "gemma3": 62}  # layers of the 27B models: hidden size / heads, not the head's size
_LOCAL_BASE = 10000.0  # of the rotation in layers with a window
_CAPS = ("attn_logit_softcapping", "final_logit_softcapping")


def is_gemma(name: str) -> bool:
    return name in KINDS.values()


def why_not(name: str, config: Mapping[str, Any]) -> str:
    """Why llama.cpp would compute something else; empty where it would not."""
    activation = config.get("hidden_activation") or config.get("hidden_act")
    if activation != "gelu_pytorch_tanh":
        return f"its activation is {activation}, llama.cpp computes gelu_pytorch_tanh"
    if config.get("attention_bias") or config.get("use_bidirectional_attention"):
        return "llama.cpp's has no attention bias, and looks back only"
    if config.get("tie_word_embeddings") is False:
        return "its head is not its embedding, in llama.cpp's it is"
    if name == "gemma":
        return ""
    capped = [cap for cap in _CAPS if config.get(cap) is not None]
    if capped != (list(_CAPS) if name == "gemma2" else []):
        return f"its logits are capped by {', '.join(capped) or 'nothing'}, llama.cpp's {name} otherwise"
    if _types(config) != _windows(name, config):
        return "other layers attend to a window than in llama.cpp's"
    if config.get("query_pre_attn_scalar", 256) != _divisor(name, config):
        return f"its queries are divided by the root of {config.get('query_pre_attn_scalar')}, llama.cpp's by another"
    if name == "gemma3" and _local_base(config) != _LOCAL_BASE:
        return f"layers with a window rotate by {_local_base(config):g}, llama.cpp's by {_LOCAL_BASE:g}"
    return ""


def settings(name: str, config: Mapping[str, Any]) -> dict[str, Any]:
    """Hyperparameters that no other model has."""
    window = {"attention.sliding_window": int(config.get("sliding_window") or 4096)} if name != "gemma" else {}
    return window | ({cap: float(config[cap]) for cap in _CAPS} if name == "gemma2" else {})


def rotation(config: Mapping[str, Any]) -> dict[str, Any]:
    """The rotary settings of layers that attend to everything."""
    nested = config.get("rope_parameters") or {}
    if "full_attention" in nested:
        return rope({"rope_parameters": nested["full_attention"]})
    default = 1e6 if config.get("model_type") == "gemma3_text" else 1e4
    return rope({"rope_theta": default, **{key: value for key, value in config.items() if value is not None}})


def _local_base(config: Mapping[str, Any]) -> float:
    nested = (config.get("rope_parameters") or {}).get("sliding_attention", {})
    return float(nested.get("rope_theta") or config.get("rope_local_base_freq") or _LOCAL_BASE)


def _types(config: Mapping[str, Any]) -> list[str]:
    told = config.get("layer_types")
    period = config.get("sliding_window_pattern") or config.get("_sliding_window_pattern")
    name = KINDS[str(config.get("model_type"))]
    return list(told) if told else _windows(name, config, int(period) if period else None)


def _windows(name: str, config: Mapping[str, Any], period: int | None = None) -> list[str]:
    period = period or _PERIOD[name]
    layers = int(config["num_hidden_layers"])
    return ["full_attention" if (i + 1) % period == 0 else "sliding_attention" for i in range(layers)]


def _divisor(name: str, config: Mapping[str, Any]) -> float:
    if config["num_hidden_layers"] == _DIVIDED_BY_WIDTH[name]:
        return float(config["hidden_size"] / config["num_attention_heads"])
    return float(config.get("head_dim") or 256)
