"""Llama-shaped models of any size and adapters for them, written tensor by tensor: a model of 13 GB takes no memory."""

from __future__ import annotations

import json
import math
import shutil
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

LINEAR = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
ATTENTION = LINEAR[:4]


@dataclass(frozen=True)
class Shape:
    """What decides the size of a Llama."""

    width: int
    inner: int
    layers: int
    heads: int
    key_heads: int
    vocabulary: int = 32000
    tied: bool = False

    @property
    def config(self) -> dict[str, Any]:
        return {
            "architectures": ["LlamaForCausalLM"],
            "model_type": "llama",
            "hidden_size": self.width,
            "intermediate_size": self.inner,
            "num_hidden_layers": self.layers,
            "num_attention_heads": self.heads,
            "num_key_value_heads": self.key_heads,
            "vocab_size": self.vocabulary,
            "max_position_embeddings": 2048,
            "rms_norm_eps": 1e-5,
            "hidden_act": "silu",
            "tie_word_embeddings": self.tied,
            "dtype": "bfloat16",
        }

    @property
    def tensors(self) -> dict[str, tuple[int, ...]]:
        """Name → shape, in checkpoint order."""
        keys = self.width // self.heads * self.key_heads
        found: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (self.vocabulary, self.width)}
        for i in range(self.layers):
            layer = f"model.layers.{i}"
            found |= {
                f"{layer}.self_attn.q_proj.weight": (self.width, self.width),
                f"{layer}.self_attn.k_proj.weight": (keys, self.width),
                f"{layer}.self_attn.v_proj.weight": (keys, self.width),
                f"{layer}.self_attn.o_proj.weight": (self.width, self.width),
                f"{layer}.mlp.gate_proj.weight": (self.inner, self.width),
                f"{layer}.mlp.up_proj.weight": (self.inner, self.width),
                f"{layer}.mlp.down_proj.weight": (self.width, self.inner),
                f"{layer}.input_layernorm.weight": (self.width,),
                f"{layer}.post_attention_layernorm.weight": (self.width,),
            }
        found["model.norm.weight"] = (self.width,)
        return found if self.tied else found | {"lm_head.weight": (self.vocabulary, self.width)}


LLAMA_1B = Shape(width=2048, inner=5632, layers=22, heads=32, key_heads=4)  # TinyLlama's: 2.2 GB
LLAMA_3B = Shape(width=3072, inner=8192, layers=28, heads=24, key_heads=8, vocabulary=128256, tied=True)  # 6.4 GB
LLAMA_7B = Shape(width=4096, inner=11008, layers=32, heads=32, key_heads=32)  # 13.5 GB
SMALL = Shape(width=1024, inner=2816, layers=12, heads=16, key_heads=16)  # 0.4 GB


def write_base(folder: Path, shape: Shape, *, shards: int) -> Path:
    """A bfloat16 model of random weights; left alone where it is there already."""
    if folder.is_dir():
        return folder
    partial = folder.with_name(folder.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    size = sum(map(math.prod, shape.tensors.values()))
    files: list[dict[str, tuple[int, ...]]] = [{} for _ in range(shards)]
    done = 0
    for name, dimensions in shape.tensors.items():
        files[min(shards - 1, done * shards // size)][name] = dimensions
        done += math.prod(dimensions)
    names = [f"model-{i + 1:05d}-of-{shards:05d}.safetensors" if shards > 1 else SINGLE for i in range(shards)]
    for name, tensors in zip(names, files, strict=True):
        _write_file(partial / name, tensors)
    if shards > 1:
        weight_map = {tensor: name for name, tensors in zip(names, files, strict=True) for tensor in tensors}
        index = {"metadata": {"total_size": 2 * size}, "weight_map": weight_map}
        (partial / "model.safetensors.index.json").write_text(json.dumps(index, indent=1))
    (partial / "config.json").write_text(json.dumps(shape.config, indent=1))
    partial.rename(folder)
    return folder


SINGLE = "model.safetensors"


def _write_file(path: Path, tensors: Mapping[str, tuple[int, ...]]) -> None:
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, dimensions in tensors.items():
        start, end = end, end + 2 * math.prod(dimensions)
        header[name] = {"dtype": "BF16", "shape": list(dimensions), "data_offsets": [start, end]}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        for name, dimensions in tensors.items():
            file.write(_values(name, dimensions))


def _values(name: str, dimensions: tuple[int, ...]) -> bytes:
    import torch

    if len(dimensions) == 1:
        return bytes(torch.ones(dimensions).bfloat16().view(torch.uint8).numpy().data)
    generator = torch.Generator().manual_seed(len(name) + dimensions[0])
    part = (torch.randn(min(dimensions[0], 512), dimensions[1], generator=generator) * 0.02).bfloat16()
    whole = part.repeat(-(-dimensions[0] // len(part)), 1)[: dimensions[0]]  # random enough, and quick to make
    return bytes(whole.view(torch.uint8).numpy().data)


def write_adapter(folder: Path, shape: Shape, *, targets: tuple[str, ...] = LINEAR, rank: int = 16) -> Path:
    """Random float32 factors as PEFT saves them; left alone where they are there already."""
    import torch
    from safetensors.torch import save_file

    if folder.is_dir():
        return folder
    generator = torch.Generator().manual_seed(1)
    factors = {}
    for name, dimensions in shape.tensors.items():
        module = name.removesuffix(".weight")
        if module.rsplit(".", 1)[-1] in targets:
            rows, columns = dimensions
            key = f"base_model.model.{module}"
            factors[f"{key}.lora_A.weight"] = torch.randn(rank, columns, generator=generator) * 0.02
            factors[f"{key}.lora_B.weight"] = torch.randn(rows, rank, generator=generator) * 0.02
    config = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "r": rank,
        "lora_alpha": 2 * rank,
        "target_modules": list(targets),
        "bias": "none",
    }
    partial = folder.with_name(folder.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    (partial / "adapter_config.json").write_text(json.dumps(config, indent=1))
    save_file(factors, partial / "adapter_model.safetensors", metadata={"format": "pt"})
    partial.rename(folder)
    return folder


def peak_memory(*, reset: bool = False) -> int:
    """The largest resident size so far, in bytes; ``reset`` starts over from the present one."""
    if reset:
        Path("/proc/self/clear_refs").write_text("5")
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("VmHWM"):
            return int(line.split()[1]) * 1024
    raise RuntimeError("no VmHWM: this benchmark needs Linux")


def warm(*folders: Path) -> None:
    """Into the page cache."""
    for file in (file for folder in folders for file in folder.iterdir()):
        with file.open("rb", buffering=0) as opened:
            buffer = bytearray(2**24)
            while opened.readinto(buffer):
                pass
