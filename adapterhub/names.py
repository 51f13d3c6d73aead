"""Module names in memory → tensor names in the checkpoint, per architecture. No torch.

An adapter names modules as they are in memory; a checkpoint names tensors as its architecture is published. The two
differ where transformers renames on loading: Mixtral's ``mlp.gate`` is stored as ``block_sparse_moe.gate``. The table
is transformers 5.19's, and a test compares each line with it. What is not in the table is refused: a name that is there
under another meaning would make a wrong model.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from adapterhub.errors import Unsupported

Renames = tuple[tuple[str, str], ...]


@dataclass(frozen=True)
class Experts:
    """Fused experts: parameters of the module ``…experts``, each (experts, out, in) in memory.

    A checkpoint has them as they are, or a tensor an expert: ``…experts.3.up_proj.weight``.
    """

    parts: Mapping[str, tuple[str, ...]]  # parameter → what one expert calls its rows, from the top
    others: tuple[str, ...] = ()  # parameters with a row an expert
    transposed: bool = False  # (experts, in, out)

    @property
    def parameters(self) -> tuple[str, ...]:
        """In the order in which the module has them."""
        return tuple(name for part in self.parts for name in (part, *(o for o in self.others if o.startswith(part))))


@dataclass(frozen=True)
class Architecture:
    """What is special about one ``model_type``."""

    embedding: str = "model.embed_tokens"  # module, in memory
    head: str = "lm_head"  # module, in memory
    tied: bool = False  # whether the head is the embedding where the config does not say
    conv1d: bool = False  # weights are (in, out)
    renamed: Renames = ()  # pattern in memory, how it is stored
    experts: Experts | None = None

    def stored(self, module: str) -> tuple[str, ...]:
        """The names that a module may have in a checkpoint, likeliest first.

        Older checkpoints have the name that is in memory now, adapters of older transformers have the stored one, and
        a checkpoint of the bare model lacks the first part: ``transformer.h.0`` is ``h.0``.
        """
        renamed = module
        for pattern, replacement in self.renamed:
            renamed = re.sub(pattern, replacement, renamed)
        return tuple(dict.fromkeys(name for name in (renamed, module, module.partition(".")[2]) if name))

    def expert_tensors(self, module: str) -> Iterator[str]:
        """What the first expert, or the stack, of a module of fused experts may be called in a checkpoint."""
        for parameter, parts in self.experts.parts.items() if self.experts else ():
            yield from self.stored(f"{module}.{parameter}")
            yield from (f"{name}.0.{part}.weight" for name in self.stored(module) for part in parts)


_BLOCK_SPARSE: Renames = (
    (r"\.mlp\.(?:gate|router)$", ".block_sparse_moe.gate"),
    (r"\.mlp\.experts\b", ".block_sparse_moe.experts"),
)
_W123 = Experts({"gate_up_proj": ("w1", "w3"), "down_proj": ("w2",)})
_GATE_UP_DOWN = Experts({"gate_up_proj": ("gate_proj", "up_proj"), "down_proj": ("down_proj",)})
_GPT_OSS = Experts(
    {"gate_up_proj": (), "down_proj": ()}, others=("gate_up_proj_bias", "down_proj_bias"), transposed=True
)
_GRANITE: Renames = (
    (r"\.block_sparse_moe\.router$", ".block_sparse_moe.router.layer"),
    (r"\.block_sparse_moe\.experts\.gate_up_proj$", ".block_sparse_moe.input_linear.weight"),
    (r"\.block_sparse_moe\.experts\.down_proj$", ".block_sparse_moe.output_linear.weight"),
)
_GEMMA3: Renames = (
    (r"^model\.language_model\.", "language_model.model."),
    (r"^lm_head$", "language_model.lm_head"),
    (r"^model\.(vision_tower|multi_modal_projector)\.", r"\1."),
)
_LLAMA = Architecture()
_TIED = Architecture(tied=True)

ARCHITECTURES: Mapping[str, Architecture] = {
    **dict.fromkeys(
        (
            *("llama", "mistral", "ministral3", "qwen2", "qwen3", "phi", "phi3", "olmo", "olmo2", "olmo3", "stablelm"),
            *("granite", "glm", "glm4", "exaone4", "helium", "persimmon", "seed_oss", "arcee", "apertus", "cwm"),
        ),
        _LLAMA,
    ),
    **dict.fromkeys(
        ("qwen2_moe", "qwen3_moe", "olmoe", "glm4_moe", "deepseek_v2", "deepseek_v3"),
        Architecture(experts=_GATE_UP_DOWN),
    ),
    "gpt_oss": Architecture(experts=_GPT_OSS),
    **dict.fromkeys(
        (
            *("gemma", "gemma2", "gemma3_text", "vaultgemma", "cohere", "cohere2", "starcoder2", "smollm3"),
            *("ernie4_5", "lfm2"),
        ),
        _TIED,
    ),
    **dict.fromkeys(("mixtral", "phimoe", "minimax"), Architecture(renamed=_BLOCK_SPARSE, experts=_W123)),
    "granitemoe": Architecture(renamed=_GRANITE, experts=Experts({"gate_up_proj": (), "down_proj": ()})),
    "gemma3": Architecture(embedding="model.language_model.embed_tokens", tied=True, renamed=_GEMMA3),
    "gpt2": Architecture(embedding="transformer.wte", tied=True, conv1d=True),
    "openai-gpt": Architecture(embedding="transformer.tokens_embed", tied=True, conv1d=True),
    "gpt_neo": Architecture(embedding="transformer.wte", tied=True),
    "gpt_bigcode": Architecture(embedding="transformer.wte", tied=True),
    "mpt": Architecture(embedding="transformer.wte", tied=True),
    "gptj": Architecture(embedding="transformer.wte"),
    "codegen": Architecture(embedding="transformer.wte"),
    "gpt_neox": Architecture(embedding="gpt_neox.embed_in", renamed=((r"^lm_head$", "embed_out"),)),
    "falcon": Architecture(embedding="transformer.word_embeddings", tied=True),
    "bloom": Architecture(embedding="transformer.word_embeddings", tied=True),
    "opt": Architecture(embedding="model.decoder.embed_tokens", tied=True),
}


FUSED = re.compile(r"(?P<module>.+\.experts)(?P<inside>(?:\.base_layer)*)")  # as PEFT names what it wraps


def architecture(config: Mapping[str, Any]) -> Architecture:
    """The line of the table for a base's config. Raises Unsupported where there is none."""
    kind = config.get("model_type")
    if kind not in ARCHITECTURES:
        raise Unsupported(
            f"adapters of the architecture {kind!a} cannot be merged",
            why=f"how its checkpoints name their tensors is known of {len(ARCHITECTURES)} others, not of this one",
            hint="serve it as an adapter, or merge it with PEFT",
        )
    return ARCHITECTURES[str(kind)]


def tied(config: Mapping[str, Any]) -> bool:
    """Whether the head is the embedding."""
    inner = config.get("text_config") or {}
    default = inner.get("tie_word_embeddings", architecture(config).tied)
    return bool(config.get("tie_word_embeddings", default))
