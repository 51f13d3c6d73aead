"""A served engine for benchmarks, random adapters for it, and the time to a first token."""

from __future__ import annotations

import contextlib
import json
import random
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import httpx
import numpy as np
from safetensors.numpy import save_file

from adapterhub.base import BaseModel, find_base
from adapterhub.manifest import Record
from adapterhub.refs import AdapterName
from adapterhub.registry import Registry, draft, open_registry
from adapterhub.serving.arguments import ServeOptions
from adapterhub.serving.engine import Engine

LINEAR = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
WORDS = ["red", "blue", "green", "house", "tree", "car", "dog", "sky", "river", "moon", "stone", "bread", "wind"]


@dataclass
class Server:
    """A running engine and its registry."""

    url: str
    registry: Registry
    base: BaseModel
    folder: Path
    http: httpx.Client


@contextlib.contextmanager
def serve(folder: Path, base: Path) -> Iterator[Server]:
    """`ah serve` in float32 on a free port, with an empty registry below ``folder``."""
    registry = open_registry((folder / "registry").as_uri())
    options = ServeOptions(
        base=str(base), registry=registry.url, cache=folder / "cache", port=0, dtype="float32", max_model_len=1024
    )
    with Engine(options) as engine, httpx.Client(base_url=engine.url, timeout=120) as http:
        yield Server(engine.url, registry, find_base(str(base)), folder, http)


def published(server: Server, name: AdapterName, *, seed: int, rank: int = 8) -> Record:
    """A random adapter on all linear layers, loud enough to change every answer, as the next version of ``name``."""
    path = server.folder / f"adapter-{seed}-{rank}"
    path.mkdir()
    rng = np.random.default_rng(seed)
    tensors = {}
    for tensor_name, (_, tensor) in server.base.tensors.items():
        module = tensor_name.removesuffix(".weight")
        if module.rsplit(".", 1)[-1] in LINEAR:
            out, width = tensor.shape
            key = f"base_model.model.{module}"
            tensors[f"{key}.lora_A.weight"] = rng.normal(0, width**-0.5, (rank, width)).astype("float32")
            tensors[f"{key}.lora_B.weight"] = rng.normal(0, rank**-0.5, (out, rank)).astype("float32")
    config = {"peft_type": "LORA", "task_type": "CAUSAL_LM", "r": rank, "lora_alpha": 2 * rank, "bias": "none"}
    (path / "adapter_config.json").write_text(json.dumps(config | {"target_modules": list(LINEAR)}))
    save_file(tensors, path / "adapter_model.safetensors")
    return server.registry.publish(draft(path, base=server.base), name=name, author="bench")


def time_to_first_token(server: Server, model: str, *, seed: int, expect: str | None = None) -> float:
    """Seconds until the first token of a streamed answer; its prompt of 40 words was never asked before."""
    rng = random.Random(f"{model} {seed} {time.time_ns()}")
    content = " ".join(rng.choices(WORDS, k=40))
    body = {"model": model, "messages": [{"role": "user", "content": content}], "max_tokens": 4, "stream": True}
    start = time.perf_counter()
    with server.http.stream("POST", "/v1/chat/completions", json=body | {"temperature": 0}) as answer:
        answer.raise_for_status()
        if expect is not None:
            assert answer.headers["x-adapterhub-version"] == expect
        for line in answer.iter_lines():
            if line.startswith("data: {") and '"finish_reason":null' in line and '"role"' not in line:
                return time.perf_counter() - start
    raise AssertionError("an answer without a token")
