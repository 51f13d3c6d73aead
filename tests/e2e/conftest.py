"""One real engine for all end-to-end tests: started once, with two tenants' adapters on the small real base.

Tests publish adapters of their own under names of their own, and leave those of others alone.
"""

from __future__ import annotations

import contextlib
import json
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
from safetensors.numpy import save_file

from adapterhub.base import BaseModel, find_base
from adapterhub.manifest import Record
from adapterhub.refs import AdapterName
from adapterhub.registry import Registry, draft, open_registry
from adapterhub.serving.bill.ledger import Ledger
from adapterhub.serving.database import default_url, open_database

TARGETS = ("o_proj", "down_proj")
QUESTION = [{"role": "user", "content": "What is the capital of France?"}]


@dataclass
class Served:
    """A running server and what it serves from."""

    url: str
    registry: Registry
    base: BaseModel
    cache: Path
    folder: Path  # for adapters
    log: Path
    http: httpx.Client
    processes: Callable[[], list[int]]
    ledger: Ledger

    def publish(
        self, name: str, *, seed: int, rank: int = 8, channel: str | None = None, template: str | None = None
    ) -> Record:
        """A random adapter, strong enough to change every answer plainly; with a chat template of its own or none."""
        path = self.folder / f"{name.replace('/', '-')}-{seed}-{rank}"
        write_loud_adapter(path, base=self.base, seed=seed, rank=rank)
        if template is not None:
            (path / "chat_template.jinja").write_text(template)
        record = self.registry.publish(draft(path, base=self.base), name=AdapterName.parse(name), author="tests")
        if channel:
            self.move(name, channel, record.version)
        return record

    def move(self, name: str, channel: str, version: int) -> None:
        self.registry.set_channel(AdapterName.parse(name), channel, {version: 100}, who="tests")

    def poll(self) -> None:
        assert self.http.post("/adapterhub/poll").status_code == 200

    def state(self) -> dict[str, Any]:
        state: dict[str, Any] = self.http.get("/adapterhub/state").json()
        return state

    def ask(self, model: str, *, messages: Any = QUESTION, tokens: int = 12, **body: Any) -> httpx.Response:
        """One greedy answer."""
        request = {"model": model, "messages": messages, "max_tokens": tokens, "temperature": 0} | body
        return self.http.post("/v1/chat/completions", json=request)

    def text(self, model: str, **options: Any) -> str:
        answer = self.ask(model, **options)
        assert answer.status_code == 200, answer.text
        text: str = answer.json()["choices"][0]["message"]["content"]
        return text

    @contextlib.contextmanager
    def stream(self, model: str, *, tokens: int = 12, **body: Any) -> Iterator[tuple[httpx.Response, Iterator[Any]]]:
        """A streaming answer that goes on to its last token, and its chunks as they come."""
        request = {"model": model, "messages": QUESTION, "max_tokens": tokens, "temperature": 0} | body
        request |= {"stream": True, "ignore_eos": True}
        with self.http.stream("POST", "/v1/chat/completions", json=request) as answer:
            yield answer, (json.loads(line[6:]) for line in answer.iter_lines() if line.startswith("data: {"))

    def until(self, condition: Callable[[], bool], *, seconds: float = 60) -> None:
        deadline = time.monotonic() + seconds
        while not condition():
            assert time.monotonic() < deadline, "it did not come true"
            time.sleep(0.05)


def write_loud_adapter(path: Path, *, base: BaseModel, seed: int, rank: int) -> None:
    """PEFT's layout, random factors: what they add is about as large as what the weights give."""
    rng = np.random.default_rng(seed)
    tensors = {}
    for name, (_, tensor) in base.tensors.items():
        module = name.removesuffix(".weight")
        if module.rsplit(".", 1)[-1] in TARGETS:
            out, width = tensor.shape
            tensors[f"base_model.model.{module}.lora_A.weight"] = rng.normal(0, width**-0.5, (rank, width))
            tensors[f"base_model.model.{module}.lora_B.weight"] = rng.normal(0, rank**-0.5, (out, rank))
    path.mkdir(parents=True)
    config = {"peft_type": "LORA", "task_type": "CAUSAL_LM", "r": rank, "lora_alpha": 3 * rank, "bias": "none"}
    (path / "adapter_config.json").write_text(json.dumps(config | {"target_modules": list(TARGETS)}))
    save_file({k: v.astype("float32") for k, v in tensors.items()}, path / "adapter_model.safetensors")


@pytest.fixture(scope="session")
def served(base_dir: Path, tmp_path_factory: pytest.TempPathFactory, collector_of_all: Any) -> Iterator[Served]:
    """``acme/support`` with versions 1 and 2 (``prod`` is 1), and ``globex/desk``."""
    from adapterhub.serving.arguments import ServeOptions
    from adapterhub.serving.engine.engine import Engine

    folder = tmp_path_factory.mktemp("e2e")
    registry, base, cache = open_registry((folder / "registry").as_uri()), find_base(str(base_dir)), folder / "cache"
    options = ServeOptions(
        base=str(base_dir),
        registry=registry.url,
        cache=cache,
        port=0,
        max_loras=4,
        dtype="float32",
        max_model_len=512,
        database=default_url(folder / "home"),  # without tenants: usage goes there
        usage=folder / "usage",
        # a babbling adapter would fill its JSON with white space
        vllm_args=(
            *("--enforce-eager", "--enable-auto-tool-choice", "--tool-call-parser", "hermes"),
            *("--tool-strict-level", "parameter"),
            *("--structured-outputs-config", '{"backend": "xgrammar", "disable_any_whitespace": true}'),
        ),
    )
    with pytest.MonkeyPatch.context() as environment:
        environment.setenv("VLLM_CPU_KVCACHE_SPACE", "1")  # GiB
        environment.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", collector_of_all.url)
        environment.setenv("OTEL_BSP_SCHEDULE_DELAY", "200")  # milliseconds
        engine = Engine(options)
        engine.start()
    try:
        with httpx.Client(base_url=engine.url, timeout=120, trust_env=False) as http:
            ledger = Ledger(open_database(default_url(folder / "home")))
            server = Served(engine.url, registry, base, cache, folder, engine.log, http, engine.processes, ledger)
            server.publish("acme/support", seed=1, channel="prod")
            server.publish("acme/support", seed=2)
            server.publish("globex/desk", seed=3, channel="prod")
            yield server
    finally:
        engine.stop()
