"""Reads an adapter directory as PEFT writes it, and judges it: no torch, no PEFT.

    adapter_config.json            rank, alpha, target modules, variant
    adapter_model.safetensors      the factors; read by its header alone, except for the weight checks

`read` refuses what is broken (AdapterError); `verdicts` says what a whole adapter can be used for, and why not.
The rules are those of vLLM 0.32's PEFTHelper and of our own merge; docs/decisions tell when they move.
"""

from __future__ import annotations

import json
import re
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

from adapterhub.errors import AdapterError
from adapterhub.manifest import LoraShape, Verdict, Verdicts

CONFIG = "adapter_config.json"
WEIGHTS = "adapter_model.safetensors"
VLLM = "vllm 0.32"
VLLM_MAX_RANK = 512

_MAX_HEADER = 100 * 1024 * 1024  # bytes; safetensors' own limit
_DTYPE_BYTES = {
    "F64": 8,
    "F32": 4,
    "F16": 2,
    "BF16": 2,
    "F8_E4M3": 1,
    "F8_E5M2": 1,
    "I8": 1,
    "U8": 1,
    "I64": 8,
    "I32": 4,
}
_FACTOR = re.compile(
    r"(?P<module>.+)\.lora_(?P<kind>A|B|embedding_A|embedding_B|magnitude_vector|B(?:\.default)?\.bias)"
    r"(?:\.default)?(?:\.weight)?"
)
_PREFIX = "base_model.model."
# Variants of PEFT whose layer is not W + s·B·A of the base's own W, whatever their tensors look like.
_NO_PLAIN_SUM = {
    "kasa_config": "KaSA changes the base's weights",
    "use_bdlora": "BD-LoRA's factors are block-diagonal",
    "monteclora_config": "MonteCLoRA samples its factors",
    "arrow_config": "Arrow chooses among adapters for each token",
}


@dataclass(frozen=True)
class Tensor:
    """One tensor of a safetensors file, from its header."""

    name: str
    dtype: str  # safetensors' name: "F32", "BF16", …
    shape: tuple[int, ...]
    start: int  # bytes from the start of the file
    end: int


@dataclass(frozen=True)
class Factor:
    """The A and B of one module: W' = W + scale · B·A, with A (rank, in) and B (out, rank)."""

    module: str  # the base model's module name: "model.layers.0.self_attn.q_proj"
    a: Tensor
    b: Tensor
    rank: int
    scale: float  # alpha/r, or alpha/sqrt(r) for rsLoRA (arXiv:2312.03732)
    embedding: bool = False
    magnitude: Tensor | None = None  # DoRA's m (out,): W' = m · V/‖V‖ with V = W + scale · B·A (arXiv:2402.09353)
    bias: Tensor | None = None  # of lora_bias (out,): scale times it is added to the layer's bias


@dataclass(frozen=True)
class PeftDir:
    """A whole adapter directory, read and checked."""

    path: Path
    config: Mapping[str, Any]
    tensors: Mapping[str, Tensor]
    factors: tuple[Factor, ...]
    others: tuple[Tensor, ...]  # modules to save, biases, resized embeddings …

    @property
    def shape(self) -> LoraShape:
        """What the manifest says of it."""
        dtypes = {t.dtype for t in self.tensors.values()}
        return LoraShape(
            rank=max((f.rank for f in self.factors), default=0),
            alpha=float(self.config.get("lora_alpha") or 0),
            target_modules=tuple(sorted({f.module.rsplit(".", 1)[-1] for f in self.factors})),
            parameters=sum(_elements(t.shape) for t in self.tensors.values()),
            dtype=dtypes.pop() if len(dtypes) == 1 else "mixed",
            rslora=bool(self.config.get("use_rslora")),
            variant="dora" if self.config.get("use_dora") else "lora",
        )


def read(path: Path) -> PeftDir:
    """Read an adapter directory: config and headers only, in milliseconds.

    Raises:
        AdapterError: no config, pickled weights, truncated or foreign files, factors that do not fit.
    """
    config = _read_config(path)
    weights = path / WEIGHTS
    if not weights.is_file():
        _refuse_missing_weights(path)
    tensors = {t.name: t for t in read_header(weights)}
    factors, others = _pair(config, tensors, path)
    if not factors:
        raise AdapterError(
            f"{weights} holds no LoRA factors",
            why=f"none of its {len(tensors)} tensors is named …lora_A or …lora_B",
            hint="publish the directory that PEFT's save_pretrained wrote",
        )
    return PeftDir(path=path, config=config, tensors=tensors, factors=factors, others=others)


def read_header(path: Path) -> list[Tensor]:
    """The tensors of a safetensors file, in file order, from its header alone.

    Raises:
        AdapterError: the file is truncated, or is no safetensors file.
    """
    try:
        size = path.stat().st_size
        with path.open("rb") as file:
            head = file.read(8)
            length = struct.unpack("<Q", head)[0] if len(head) == 8 else _MAX_HEADER + 1
            if length > min(_MAX_HEADER, size - 8):
                raise AdapterError(
                    f"{path} is truncated or no safetensors file",
                    why=f"its header claims {length} bytes, the file has {size}",
                    hint="copy it again, or save the adapter again",
                )
            header = json.loads(file.read(length))
    except OSError as error:
        raise AdapterError(f"{path} cannot be read", why=error.strerror or str(error)) from error
    except ValueError as error:
        raise AdapterError(f"{path} is no safetensors file", why="its header is not JSON") from error
    if not isinstance(header, dict):
        raise AdapterError(f"{path} is no safetensors file", why="its header is not a JSON object")
    tensors = sorted(
        (_tensor(path, name, entry, 8 + length, size) for name, entry in header.items() if name != "__metadata__"),
        key=lambda t: (t.start, t.end),
    )
    for before, after in pairwise(tensors):
        if after.start < before.end:
            raise AdapterError(f"{path} is no safetensors file", why=f"{before.name} and {after.name} overlap")
    return tensors


def scale_of(config: Mapping[str, Any], module: str, rank: int) -> float:
    """The factor before B·A for one module: alpha/r, or alpha/√r for rsLoRA; alpha patterns by PEFT's rule."""
    alpha = float(pattern_value(config.get("alpha_pattern") or {}, module, config.get("lora_alpha", 8)))
    return alpha / (rank**0.5 if config.get("use_rslora") else rank)


def is_parameter(config: Mapping[str, Any], name: str) -> bool:
    """Whether PEFT adapts this parameter by its own name (``target_parameters``), and not the module that it is of."""
    return any(f".{name}".endswith(f".{target}") for target in config.get("target_parameters") or ())


def pattern_value(pattern: Mapping[str, Any], module: str, default: Any) -> Any:
    """PEFT's rule for rank and alpha patterns: the first key that, as a regex, matches the name or ends it."""
    for key, value in pattern.items():
        if re.match(rf"(.*\.)?({key})$", module):
            return value
    return default


def verdicts(adapter: PeftDir) -> Verdicts:
    """What the adapter can be used for, judged from config and headers; the base may still say no."""
    variant = _variant_reason(adapter)
    serve = variant or _serve_reason(adapter)
    merge = _merge_reason(adapter)
    gguf = variant or plain_reason(adapter)
    return Verdicts(
        serve=Verdict("no" if serve else "yes", serve, VLLM),
        merge=Verdict("no" if merge else "yes", merge),
        gguf=Verdict("no" if gguf else "yes", gguf),
    )


# ── the rules ────────────────────────────────────────────────────────────────────────────────────────────────


def _variant_reason(adapter: PeftDir) -> str:
    config = adapter.config
    if config.get("use_dora"):
        return "DoRA: the engine has no magnitude vectors"
    if (config.get("bias") or "none") != "none":
        return f"bias: {config['bias']} is not served; train with bias: none"
    if config.get("lora_bias"):
        return "lora_bias is not served"
    if config.get("alora_invocation_tokens"):
        return "aLoRA is not served"
    if config.get("use_qalora"):
        return "QALoRA is not served"
    if config.get("layer_replication"):
        return "layer replication changes the base's depth"
    return _initialisation_reason(config)


def _initialisation_reason(config: Mapping[str, Any]) -> str:
    for key, why in _NO_PLAIN_SUM.items():
        if config.get(key):
            return f"{key}: {why}"
    init = config.get("init_lora_weights")
    if isinstance(init, str) and init.lower().startswith(("pissa", "olora", "corda", "loftq", "lora_ga")):
        return f"{init} changes the base's weights; convert it with PEFT's path_initial_model_for_weight_conversion"
    return ""


def _serve_reason(adapter: PeftDir) -> str:
    rank = max(f.rank for f in adapter.factors)
    if rank > VLLM_MAX_RANK:
        return f"rank {rank}: the engine takes up to {VLLM_MAX_RANK}"
    saved = [m for m in adapter.config.get("modules_to_save") or [] if m not in {"classifier", "score"}]
    if saved:
        return f"modules_to_save {', '.join(saved)}: the engine takes only classifier heads"
    if any(f.embedding for f in adapter.factors):
        return "LoRA on embeddings is not served"
    if adapter.config.get("trainable_token_indices"):
        return "trainable tokens are not served"
    if adapter.config.get("target_parameters"):
        return "LoRA on parameters (fused experts) is not served"
    return ""


def _merge_reason(adapter: PeftDir) -> str:
    config = adapter.config
    if config.get("alora_invocation_tokens"):
        return "aLoRA acts on some tokens only and cannot be merged"
    if config.get("layer_replication"):
        return "layer replication changes the base's depth"
    heads = {"classifier", "score"} & set(config.get("modules_to_save") or ())
    if heads:
        return f"modules_to_save {', '.join(sorted(heads))}: a language model has no such head"
    return _parts_reason(adapter) or _initialisation_reason(config)


def _parts_reason(adapter: PeftDir) -> str:
    """Where config and tensors say different things, PEFT ignores some of them."""
    config = adapter.config
    if config.get("use_dora") and config.get("lora_bias"):
        return "DoRA with lora_bias has no merged form"
    for factor in adapter.factors:
        if bool(config.get("use_dora")) != (factor.magnitude is not None):
            return f"use_dora is {bool(config.get('use_dora'))}, but {factor.module} says otherwise"
        if factor.bias is not None and not config.get("lora_bias"):
            return f"{factor.module} has a bias of its own, but lora_bias is not set"
    return ""


def plain_reason(adapter: PeftDir) -> str:
    """Why the adapter is more than factors of linear layers, or no sum with the base at all; empty where it is not."""
    config = adapter.config
    if config.get("use_dora"):
        return "DoRA is no sum of factors"
    if (config.get("bias") or "none") != "none" or config.get("lora_bias"):
        return "it has biases"
    if adapter.others:
        return f"{adapter.others[0].name} is no LoRA factor"
    if any(f.embedding for f in adapter.factors):
        return "it has LoRA on embeddings"
    if any(not name.endswith(".weight") for name in config.get("target_parameters") or ()):
        return "it has LoRA on fused experts"
    return _merge_reason(adapter)


# ── reading ──────────────────────────────────────────────────────────────────────────────────────────────────


def _read_config(path: Path) -> dict[str, Any]:
    file = path / CONFIG
    try:
        config = json.loads(file.read_bytes())
    except FileNotFoundError as error:
        raise AdapterError(
            f"{path} is not an adapter directory",
            why=f"it has no {CONFIG}" if path.is_dir() else "there is no such folder",
            hint="name the folder that training wrote, e.g. runs/…/adapter",
        ) from error
    except OSError as error:
        raise AdapterError(f"{file} cannot be read", why=error.strerror or str(error)) from error
    except ValueError as error:
        raise AdapterError(f"{file} is not JSON", why=str(error)) from error
    if not isinstance(config, dict) or str(config.get("peft_type", "LORA")).upper() != "LORA":
        found = config.get("peft_type") if isinstance(config, dict) else type(config).__name__
        raise AdapterError(f"{file} describes no LoRA adapter", why=f"its peft_type is {found}")
    return config


def _refuse_missing_weights(path: Path) -> None:
    pickled = sorted(p.name for p in path.iterdir() if p.suffix in {".bin", ".pt", ".pth", ".pkl"})
    if pickled:
        raise AdapterError(
            f"{path / pickled[0]} is a pickle file",
            why="loading a pickle runs whatever code its author put in; it is never published",
            hint="load it where you trust it with PEFT and save it again: save_pretrained writes " + WEIGHTS,
        )
    raise AdapterError(f"{path} has no {WEIGHTS}", hint="name the folder that training wrote, e.g. runs/…/adapter")


def _tensor(path: Path, name: str, entry: Any, offset: int, size: int) -> Tensor:
    try:
        start, end = entry["data_offsets"]
        tensor = Tensor(name, entry["dtype"], tuple(int(n) for n in entry["shape"]), offset + start, offset + end)
        width = _DTYPE_BYTES.get(tensor.dtype)
    except (KeyError, TypeError, ValueError) as error:
        raise AdapterError(f"{path}: the header's entry for {name!a} is broken", why=repr(error)) from error
    if not offset <= tensor.start <= tensor.end <= size:
        raise AdapterError(
            f"{path} is truncated",
            why=f"{name} ends at byte {tensor.end}, the file at {size}",
            hint="copy it again, or save the adapter again",
        )
    if width is not None and _elements(tensor.shape) * width != tensor.end - tensor.start:
        raise AdapterError(f"{path}: {name} has another size than its shape {list(tensor.shape)} says")
    return tensor


def _pair(
    config: Mapping[str, Any], tensors: Mapping[str, Tensor], path: Path
) -> tuple[tuple[Factor, ...], tuple[Tensor, ...]]:
    parts: dict[str, dict[str, Tensor]] = {}
    others = []
    for name, tensor in tensors.items():
        match = _FACTOR.fullmatch(name)
        if match is None:
            others.append(tensor)
        else:
            kind = "bias" if match["kind"].endswith(".bias") else match["kind"]
            parts.setdefault(match["module"].removeprefix(_PREFIX), {})[kind] = tensor
    factors = tuple(_factor(config, module, kinds, path) for module, kinds in sorted(parts.items()))
    return factors, tuple(others)


def _factor(config: Mapping[str, Any], module: str, kinds: Mapping[str, Tensor], path: Path) -> Factor:
    embedding = "embedding_A" in kinds or "embedding_B" in kinds
    a, b = (kinds.get("embedding_A"), kinds.get("embedding_B")) if embedding else (kinds.get("A"), kinds.get("B"))
    if a is None or b is None:
        raise AdapterError(f"{path / WEIGHTS}: {module} has only one of its two factors")
    if len(a.shape) < 2 or len(b.shape) < 2 or a.shape[0] != b.shape[1]:
        raise AdapterError(
            f"{path / WEIGHTS}: the factors of {module} do not fit each other",
            why=f"A is {list(a.shape)}, B is {list(b.shape)}",
        )
    rank = a.shape[0]
    if rank < 1:
        raise AdapterError(f"{path / WEIGHTS}: {module} has rank 0")
    magnitude, bias = kinds.get("magnitude_vector"), kinds.get("bias")
    for vector in (magnitude, bias):
        if vector is not None and vector.shape != b.shape[:1]:
            raise AdapterError(
                f"{path / WEIGHTS}: {vector.name} does not fit its factors",
                why=f"it is {list(vector.shape)}, B is {list(b.shape)}",
            )
    weight = f"{module}.weight"
    scale = scale_of(config, weight if is_parameter(config, weight) else module, rank)
    return Factor(module, a, b, rank, scale, embedding, magnitude, bias)


def _elements(shape: tuple[int, ...]) -> int:
    count = 1
    for n in shape:
        count *= n
    return count
