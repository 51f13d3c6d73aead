"""A served engine for benchmarks, random adapters for it, and the time to a first token."""

from __future__ import annotations

import contextlib
import json
import random
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import httpx
import numpy as np
from safetensors.numpy import save_file

from adapterhub.base import BaseModel, find_base
from adapterhub.manifest import Record
from adapterhub.refs import AdapterName
from adapterhub.registry import Registry, draft, open_registry
from adapterhub.serving.arguments import ServeOptions
from adapterhub.serving.engine.engine import Engine, prepare

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
    log: Path
    processes: Callable[[], list[int]]


@contextlib.contextmanager
def serve(
    folder: Path,
    base: Path,
    *,
    dtype: str = "float32",
    max_loras: int = 4,
    max_lora_rank: int | None = None,
    vllm_args: tuple[str, ...] = (),
    database: str | None = None,
    registry: str | None = None,
) -> Iterator[Server]:
    """`ah serve` on a free port, with a registry (or one below ``folder``), and keys where there is a database."""
    opened = open_registry(registry or (folder / "registry").as_uri())
    options = ServeOptions(
        base=str(base),
        registry=opened.url,
        cache=folder / "cache",
        port=0,
        dtype=dtype,
        max_loras=max_loras,
        max_lora_rank=max_lora_rank,
        max_model_len=1024,
        database=database,
        usage=folder / "usage" if database else None,
        vllm_args=vllm_args,
    )
    with Engine(options) as engine, httpx.Client(base_url=engine.url, timeout=600) as http:
        yield Server(engine.url, opened, find_base(str(base)), folder, http, engine.log, engine.processes)


@contextlib.contextmanager
def stock(
    folder: Path,
    base: Path,
    *,
    dtype: str = "float32",
    adapters: Mapping[str, Path] | None = None,
    resolver: Path | None = None,
    max_loras: int = 4,
    our_product: bool = False,
    vllm_args: tuple[str, ...] = (),
) -> Iterator[httpx.Client]:
    """The same engine with the same flags and none of our plug-ins; ``adapters`` are loaded when it starts, and what
    lies in the folder ``resolver`` when it is asked for.

    With ``our_product`` its LoRA product on CPU is ours: what is measured then is all the rest.
    """
    plugins = {"VLLM_PLUGINS": "none"}
    if our_product:
        plugins = {"VLLM_PLUGINS": "bench-lora", "PYTHONPATH": str(_product_plugin(folder))}
    if resolver is not None:
        plugins["VLLM_PLUGINS"] += ",lora_filesystem_resolver"
        plugins |= {"VLLM_LORA_RESOLVER_CACHE_DIR": str(resolver), "VLLM_ALLOW_RUNTIME_LORA_UPDATING": "1"}
    with tempfile.TemporaryDirectory() as empty:
        options = ServeOptions(base=str(base), registry=Path(empty).as_uri(), cache=folder / "cache", port=0)
        launch = prepare(options)
    flags = ["--model", str(base), "--served-model-name", "base", "--host", launch.host, "--port", str(launch.port)]
    flags += ["--dtype", dtype, "--max-model-len", "1024", "--enable-prefix-caching", *vllm_args]
    if adapters or resolver:
        flags += ["--enable-lora", "--max-loras", str(max_loras), "--max-lora-rank", "16"]
    if adapters:
        flags += ["--lora-modules", *(f"{name}={path}" for name, path in adapters.items())]
    launch = replace(
        launch,
        command=(*launch.command[:3], *flags),  # python -c "…" and nothing of ours
        environment={**launch.environment, **plugins, "ADAPTERHUB_SERVE": "0"},
        ready_path="/health",
    )
    with Engine(launch) as engine, httpx.Client(base_url=engine.url, timeout=600) as http:
        yield http


def _product_plugin(folder: Path) -> Path:
    """A folder for PYTHONPATH that makes `cpu_lora.install` a plug-in of its own to vLLM's processes."""
    info = folder / "plugin" / "bench_lora-0.dist-info"
    info.mkdir(parents=True, exist_ok=True)
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: bench-lora\nVersion: 0\n")
    entry = "[vllm.general_plugins]\nbench-lora = adapterhub.serving.engine.cpu_lora:install\n"
    (info / "entry_points.txt").write_text(entry)
    return info.parent


def published(server: Server, name: AdapterName, *, seed: int, rank: int = 8) -> Record:
    """A random adapter on all linear layers, loud enough to change every answer, as the next version of ``name``."""
    path = write_adapter(server.folder / f"adapter-{seed}-{rank}", server.base, seed=seed, rank=rank)
    return server.registry.publish(draft(path, base=server.base), name=name, author="bench")


def write_adapter(path: Path, base: BaseModel, *, seed: int, rank: int = 8, base_name: str | None = None) -> Path:
    """PEFT's layout, random factors on all linear layers; ``base_name`` is for vLLM's resolver, which compares it."""
    path.mkdir()
    rng = np.random.default_rng(seed)
    tensors = {}
    for tensor_name, (_, tensor) in base.tensors.items():
        module = tensor_name.removesuffix(".weight")
        if module.rsplit(".", 1)[-1] in LINEAR:
            out, width = tensor.shape
            key = f"base_model.model.{module}"
            tensors[f"{key}.lora_A.weight"] = rng.normal(0, width**-0.5, (rank, width)).astype("float32")
            tensors[f"{key}.lora_B.weight"] = rng.normal(0, rank**-0.5, (out, rank)).astype("float32")
    config = {"peft_type": "LORA", "task_type": "CAUSAL_LM", "r": rank, "lora_alpha": 2 * rank, "bias": "none"}
    config |= {"target_modules": list(LINEAR), "base_model_name_or_path": base_name}
    (path / "adapter_config.json").write_text(json.dumps(config))
    save_file(tensors, path / "adapter_model.safetensors")
    return path


def resident_bytes(processes: Iterable[int]) -> int:
    """Memory that processes hold, what they share counted once for each."""
    total = 0
    for pid in processes:
        for line in Path(f"/proc/{pid}/status").read_text().splitlines():
            if line.startswith("VmRSS:"):
                total += int(line.split()[1]) * 1024
    return total


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
