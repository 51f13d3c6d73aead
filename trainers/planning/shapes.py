"""A base model's shape, exact to the parameter, told from its ``config.json`` alone: nothing else is downloaded.

    shape = model_shape(config, name="meta-llama/Meta-Llama-3-8B")
    shape.parameters                             8,030,261,248
    lora_parameters(shape, rank=16)              41,943,040       all linear layers, as PEFT's "all-linear"

The common families are written down here, layer by layer, and tests hold each against transformers. Any other one is
built by transformers on its meta device, without a weight: the same numbers, some seconds later.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from adapterhub.errors import ConfigError, MissingDependency, NotFound, Unsupported

Json = Mapping[str, Any]
Targets = Sequence[str] | str  # names of modules, one regular expression over whole names, or "all-linear"


@dataclass(frozen=True)
class Linear:
    """One linear layer of the blocks: ``weight`` is (outputs, inputs)."""

    name: str  # model.layers.0.self_attn.q_proj
    inputs: int
    outputs: int
    bias: bool = False

    @property
    def parameters(self) -> int:
        return self.outputs * (self.inputs + self.bias)


@dataclass(frozen=True)
class ModelShape:
    """A causal language model. Counts are of parameters, not bytes."""

    family: str  # the config's model_type
    layers: int
    hidden: int
    intermediate: int  # width of one MLP, or of one expert
    heads: int
    kv_heads: int
    head_dim: int
    vocabulary: int
    positions: int | None  # the longest sequence it was made for
    linears: tuple[Linear, ...]  # of all blocks; what LoRA can adapt
    experts: int  # parameters of all expert MLPs: fused tensors, which "all-linear" does not touch
    experts_used: int  # experts a token goes through; 0 for a dense model
    embeddings: int
    head: int  # 0 where it is tied to the embeddings
    others: int  # norms, routers

    @property
    def parameters(self) -> int:
        return sum(x.parameters for x in self.linears) + self.experts + self.embeddings + self.head + self.others

    @property
    def largest_linear(self) -> int:
        """Elements of the largest weight, which a quantised base unpacks one at a time."""
        return max(x.inputs * x.outputs for x in self.linears)


def model_shape(config: Json, *, name: str = "the base") -> ModelShape:
    """The shape that a ``config.json`` describes.

    Raises:
        Unsupported: the config is of no causal language model, or of one that transformers does not know.
        MissingDependency: its family is not written down here, and transformers is not installed.
    """
    family = str(config.get("model_type", ""))
    written = _FAMILIES.get(family)
    try:
        return written(config) if written else _from_transformers(config, name)
    except (KeyError, TypeError, ZeroDivisionError) as error:
        raise Unsupported(
            f"the config.json of {name} does not describe a {family or 'language'} model",
            why=f"{type(error).__name__}: {error}",
            hint="fetch the base model again",
        ) from error


def adapted(shape: ModelShape, targets: Targets = "all-linear") -> tuple[Linear, ...]:
    """The linear layers that an adapter on ``targets`` changes, by PEFT's rules.

    Raises ConfigError where a name, or the expression, matches none.
    """
    if targets == "all-linear":
        return shape.linears
    patterns = [targets] if isinstance(targets, str) else [rf"(.*\.)?{re.escape(t)}" for t in targets]
    try:
        compiled = [re.compile(p) for p in patterns]
    except re.error as error:
        raise ConfigError("lora_target_modules is no regular expression", why=str(error)) from error
    for written, pattern in zip([targets] if isinstance(targets, str) else targets, compiled, strict=True):
        if not any(pattern.fullmatch(x.name) for x in shape.linears):
            known = ", ".join(sorted({x.name.rsplit(".", 1)[-1] for x in shape.linears}))
            raise ConfigError(
                f"lora_target_modules: the base has no layer {written!a}",
                why=f"its linear layers are {known}",
                hint="use lora_target_linear: true",
            )
    return tuple(x for x in shape.linears if any(p.fullmatch(x.name) for p in compiled))


def lora_parameters(shape: ModelShape, *, rank: int, targets: Targets = "all-linear") -> int:
    """Elements of all A (rank, inputs) and B (outputs, rank): what is trained."""
    return sum(rank * (x.inputs + x.outputs) for x in adapted(shape, targets))


# ── families ─────────────────────────────────────────────────────────────────────────────────────────────────


@dataclass(frozen=True)
class _Block:
    """The dimensions that all families share."""

    config: Json

    @property
    def hidden(self) -> int:
        return int(self.config["hidden_size"])

    @property
    def heads(self) -> int:
        return int(self.config["num_attention_heads"])

    @property
    def kv_heads(self) -> int:
        return int(self.config.get("num_key_value_heads") or self.heads)

    @property
    def head_dim(self) -> int:
        return int(self.config.get("head_dim") or self.hidden // self.heads)

    def attention(self, *, bias: bool = False, out_bias: bool = False, out: str = "o_proj") -> list[Linear]:
        queries, keys = self.heads * self.head_dim, self.kv_heads * self.head_dim
        return [
            Linear("self_attn.q_proj", self.hidden, queries, bias),
            Linear("self_attn.k_proj", self.hidden, keys, bias),
            Linear("self_attn.v_proj", self.hidden, keys, bias),
            Linear(f"self_attn.{out}", queries, self.hidden, out_bias),
        ]

    def gated_mlp(self, width: int, *, bias: bool = False) -> list[Linear]:
        return [
            Linear("mlp.gate_proj", self.hidden, width, bias),
            Linear("mlp.up_proj", self.hidden, width, bias),
            Linear("mlp.down_proj", width, self.hidden, bias),
        ]

    def shape(
        self,
        block: Iterable[Linear],
        *,
        norms: int,
        final_norm: int | None = None,
        head_bias: bool = False,
        tied_by_default: bool = False,
        experts: int = 0,
        experts_used: int = 0,
        intermediate: int | None = None,
        layer: str = "model.layers",
    ) -> ModelShape:
        """``norms`` and ``experts`` are parameters a layer; ``tied_by_default``: where the config is silent."""
        c, hidden = self.config, self.hidden
        layers, vocabulary = int(c["num_hidden_layers"]), int(c["vocab_size"])
        tied = c.get("tie_word_embeddings")
        tied = tied_by_default if tied is None else bool(tied)
        block = list(block)
        linears = (Linear(f"{layer}.{i}.{x.name}", x.inputs, x.outputs, x.bias) for i in range(layers) for x in block)
        return ModelShape(
            family=str(c["model_type"]),
            layers=layers,
            hidden=hidden,
            intermediate=intermediate or int(c["intermediate_size"]),
            heads=self.heads,
            kv_heads=self.kv_heads,
            head_dim=self.head_dim,
            vocabulary=vocabulary,
            positions=c.get("max_position_embeddings"),
            linears=tuple(linears),
            experts=layers * experts,
            experts_used=experts_used,
            embeddings=vocabulary * hidden,
            head=(0 if tied else vocabulary * hidden) + (vocabulary if head_bias else 0),
            others=layers * norms + (hidden if final_norm is None else final_norm),
        )


def _llama(config: Json) -> ModelShape:
    b, bias = _Block(config), bool(config.get("attention_bias"))
    mlp = b.gated_mlp(int(config["intermediate_size"]), bias=bool(config.get("mlp_bias")))
    return b.shape([*b.attention(bias=bias, out_bias=bias), *mlp], norms=2 * b.hidden)


def _mistral(config: Json) -> ModelShape:
    b = _Block(config)
    return b.shape([*b.attention(), *b.gated_mlp(int(config["intermediate_size"]))], norms=2 * b.hidden)


def _qwen(config: Json) -> ModelShape:
    """The first Qwen, whose own code names its layers; ``intermediate_size`` is that of both halves of its MLP."""
    b = _Block(config)
    half, queries = int(config["intermediate_size"]) // 2, int(config["kv_channels"]) * b.heads
    block = [
        Linear("attn.c_attn", b.hidden, 3 * queries, True),
        Linear("attn.c_proj", queries, b.hidden, not config.get("no_bias", True)),
        Linear("mlp.w1", b.hidden, half),
        Linear("mlp.w2", b.hidden, half),
        Linear("mlp.c_proj", half, b.hidden),
    ]
    return b.shape(block, norms=2 * b.hidden, intermediate=half, layer="transformer.h")


def _qwen2(config: Json) -> ModelShape:
    b = _Block(config)
    mlp = b.gated_mlp(int(config["intermediate_size"]))
    return b.shape([*b.attention(bias=True), *mlp], norms=2 * b.hidden)


def _qwen3(config: Json) -> ModelShape:
    b, bias = _Block(config), bool(config.get("attention_bias"))
    mlp = b.gated_mlp(int(config["intermediate_size"]))
    return b.shape([*b.attention(bias=bias, out_bias=bias), *mlp], norms=2 * b.hidden + 2 * b.head_dim)


def _gemma(norms: int, *, heads_normed: bool = False) -> Callable[[Json], ModelShape]:
    """``norms`` of the width a layer; Gemma ties its head to the embeddings."""

    def shape(config: Json) -> ModelShape:
        b, bias = _Block(config), bool(config.get("attention_bias"))
        block = [*b.attention(bias=bias, out_bias=bias), *b.gated_mlp(int(config["intermediate_size"]))]
        of_heads = 2 * b.head_dim if heads_normed else 0
        return b.shape(block, norms=norms * b.hidden + of_heads, tied_by_default=True)

    return shape


def _phi(config: Json) -> ModelShape:
    """Phi 1 and 2: one layer norm a block with weight and bias, biases everywhere, the head's too."""
    b, inner = _Block(config), int(config["intermediate_size"])
    mlp = [Linear("mlp.fc1", b.hidden, inner, True), Linear("mlp.fc2", inner, b.hidden, True)]
    attention = b.attention(bias=True, out_bias=True, out="dense")
    of_heads = 4 * b.head_dim if config.get("qk_layernorm") else 0
    return b.shape([*attention, *mlp], norms=2 * b.hidden + of_heads, final_norm=2 * b.hidden, head_bias=True)


def _phi3(config: Json) -> ModelShape:
    """Phi 3 and 4: queries, keys and values in one layer, gate and up in another."""
    b, inner = _Block(config), int(config["intermediate_size"])
    queries, keys = b.heads * b.head_dim, b.kv_heads * b.head_dim
    block = [
        Linear("self_attn.qkv_proj", b.hidden, queries + 2 * keys),
        Linear("self_attn.o_proj", queries, b.hidden),
        Linear("mlp.gate_up_proj", b.hidden, 2 * inner),
        Linear("mlp.down_proj", inner, b.hidden),
    ]
    return b.shape(block, norms=2 * b.hidden)


def _mixtral(config: Json) -> ModelShape:
    b, experts = _Block(config), int(config["num_local_experts"])
    router = experts * b.hidden
    return b.shape(
        b.attention(),
        norms=2 * b.hidden + router,
        experts=experts * 3 * b.hidden * int(config["intermediate_size"]),
        experts_used=int(config["num_experts_per_tok"]),
    )


_FAMILIES: Mapping[str, Callable[[Json], ModelShape]] = {
    "llama": _llama,
    "mistral": _mistral,
    "qwen": _qwen,
    "qwen2": _qwen2,
    "qwen3": _qwen3,
    "gemma": _gemma(2),
    "gemma2": _gemma(4),
    "gemma3_text": _gemma(4, heads_normed=True),
    "phi": _phi,
    "phi3": _phi3,
    "mixtral": _mixtral,
}


# ── any other family ─────────────────────────────────────────────────────────────────────────────────────────


def _from_transformers(config: Json, name: str) -> ModelShape:
    """Built on the meta device, where tensors have shapes and no bytes."""
    try:
        import torch
        from transformers import AutoConfig, AutoModelForCausalLM
    except ImportError as error:
        raise MissingDependency(
            f"the shape of {name} needs transformers",
            why=f"the family {config.get('model_type')!a} is not among {', '.join(_FAMILIES)}",
            hint='pip install "adapterhub[train]"',
        ) from error
    try:
        plain = dict(config)
        built = AutoConfig.for_model(plain.pop("model_type", ""), **plain)
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(built)
    except (ValueError, KeyError, TypeError, AttributeError, ImportError) as error:
        raise Unsupported(
            f"{name} is no causal language model that can be planned",
            why=str(error).strip().splitlines()[0],
            hint="name a base whose config.json says CausalLM, or install the transformers that knows it",
        ) from error
    return _measured(model, built.get_text_config(), str(config["model_type"]))


def _measured(model: Any, text: Any, family: str) -> ModelShape:
    import torch

    head = model.get_output_embeddings()
    embeddings = model.get_input_embeddings()
    linears = tuple(
        Linear(name, module.in_features, module.out_features, module.bias is not None)
        for name, module in model.named_modules()
        if isinstance(module, torch.nn.Linear) and module is not head
    )
    total = sum(p.numel() for p in model.parameters())
    embedded = sum(p.numel() for p in embeddings.parameters())
    headed = sum(p.numel() for p in head.parameters() if p is not embeddings.weight) if head is not None else 0
    experts = sum(p.numel() for name, p in model.named_parameters() if p.dim() == 3 and ".experts." in name)
    others = total - embedded - headed - experts - sum(x.parameters for x in linears)
    heads = int(text.num_attention_heads)
    if not linears:
        raise NotFound(f"a {family} model has no linear layers that LoRA could adapt")
    return ModelShape(
        family=family,
        layers=int(text.num_hidden_layers),
        hidden=int(text.hidden_size),
        intermediate=int(getattr(text, "moe_intermediate_size", None) or getattr(text, "intermediate_size", 0) or 0),
        heads=heads,
        kv_heads=int(getattr(text, "num_key_value_heads", None) or heads),
        head_dim=int(getattr(text, "head_dim", None) or text.hidden_size // heads),
        vocabulary=int(text.vocab_size),
        positions=getattr(text, "max_position_embeddings", None),
        linears=linears,
        experts=experts,
        experts_used=int(getattr(text, "num_experts_per_tok", 0) or 0) if experts else 0,
        embeddings=embedded,
        head=headed,
        others=others,
    )
