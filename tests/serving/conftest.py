"""A registry in memory, adapters in it, and an engine that keeps vLLM's promises and none of its weights."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from adapterhub.base import BaseModel, find_base
from adapterhub.errors import EngineError, EngineRefused
from adapterhub.manifest import Record
from adapterhub.refs import AdapterName
from adapterhub.registry import Registry, draft, open_registry
from adapterhub.serving.bill.account import metered
from adapterhub.serving.config import ServeConfig
from adapterhub.serving.replica import Replica

Publish = Callable[..., Record]
WAIT = 10  # seconds until a condition that must come true is given up


class MemoryEngine:
    """An `Engine` that holds folders: it refuses what vLLM would answer by evicting, or by ending.

    ``gate`` holds loads back until it is set.
    """

    def __init__(self, capacity: int) -> None:
        self.capacity = capacity
        self.held: dict[str, Path] = {}
        self.loads: list[str] = []
        self.gate = asyncio.Event()
        self.gate.set()
        self.failure: Exception | None = None
        self.refused = ""  # a name that it does not take
        self.is_dead = False
        self.turns = asyncio.Event()  # cleared: its step never ends
        self.turns.set()

    async def load(self, name: str, path: Path) -> None:
        self.loads.append(name)
        await self.gate.wait()
        if self.failure is not None:
            raise self.failure
        if name == self.refused:
            raise EngineRefused(f"{name} cannot be loaded")
        assert (path / "adapter_config.json").is_file(), "vLLM would end here"
        assert name not in self.held, "loaded twice"
        assert len(self.held) < self.capacity, "vLLM would evict what may be in use"
        self.held[name] = path

    async def forget(self, name: str) -> None:
        await asyncio.sleep(0)
        del self.held[name]

    async def beat(self) -> None:
        await self.turns.wait()
        if self.is_dead:
            raise EngineError("the engine ended")

    @staticmethod
    async def until(condition: Callable[[], object]) -> None:
        """Let the loop run until ``condition`` holds."""
        async with asyncio.timeout(WAIT):
            while not condition():
                await asyncio.sleep(0.001)


class TokenEngine:
    """What vLLM's AsyncLLM promises to who counts tokens: outputs one by one, or whole at the end, and a last one
    where a request is broken off. One token a step, and a step whenever ``pace`` allows it.
    """

    def __init__(self) -> None:
        self.pace = asyncio.Event()
        self.pace.set()
        self.cached = 0
        self.made = 0  # tokens of each answer to the last request
        self.long: int | None = None  # of the answers that `ask` asks for
        self.aborted: list[str] = []
        self.failure: Exception | None = None
        metered(self)

    async def add_request(self, request_id: str, prompt: list[int], params: Any) -> Any:
        return SimpleNamespace(left=None, get_nowait=lambda: None)

    async def generate(self, prompt: list[int], sampling_params: Any, request_id: str) -> AsyncGenerator[Any, None]:
        """``sampling_params``: output_kind (DELTA, FINAL_ONLY or CUMULATIVE), n, max_tokens."""
        kind, count = sampling_params.output_kind.name, sampling_params.n
        collector = await self.add_request(request_id, prompt, sampling_params)
        made = 0

        def output(tokens: int) -> Any:
            answers = [SimpleNamespace(index=i, token_ids=[7] * tokens) for i in range(count)]
            return SimpleNamespace(prompt_token_ids=prompt, num_cached_tokens=self.cached, outputs=answers)

        try:
            while made < sampling_params.max_tokens:
                await self.pace.wait()
                await asyncio.sleep(0)
                made += 1
                self.made = made
                if self.failure is not None:
                    raise self.failure
                if kind == "DELTA":
                    yield output(1)
                elif kind == "CUMULATIVE" or made == sampling_params.max_tokens:
                    yield output(made)
        except (asyncio.CancelledError, GeneratorExit):
            self.aborted.append(request_id)
            rest = {"DELTA": 0, "FINAL_ONLY": made, "CUMULATIVE": made}[kind]
            collector.get_nowait = lambda: output(rest)
            raise

    def ask(self, *, stream: bool, prompt: int = 30, tokens: int = 12, n: int = 1) -> AsyncGenerator[Any, None]:
        """As vLLM's routes ask for an answer."""
        kind = SimpleNamespace(name="DELTA" if stream else "FINAL_ONLY")
        params = SimpleNamespace(output_kind=kind, n=n, max_tokens=self.long or tokens)
        return self.generate([1] * prompt, params, "request")

    async def encode(self, prompt: list[int], pooling_params: Any, request_id: str) -> AsyncGenerator[Any, None]:
        await self.add_request(request_id, prompt, pooling_params)
        yield SimpleNamespace(prompt_token_ids=prompt, num_cached_tokens=0, outputs=SimpleNamespace(data=[0.1]))


@pytest.fixture
def token_engine() -> TokenEngine:
    return TokenEngine()


@pytest.fixture
def anyio_backend() -> str:
    return "asyncio"


@pytest.fixture
def registry(tmp_path: Path) -> Registry:
    return open_registry(f"memory://{tmp_path}")


@pytest.fixture
def base(tiny_base: Path) -> BaseModel:
    return find_base(str(tiny_base))


@pytest.fixture
def publish(registry: Registry, base: BaseModel, adapter_factory: Callable[..., Path]) -> Publish:
    """``publish("acme/support", seed=2, channel="prod")`` → the record."""
    count = iter(range(1_000_000))

    def make(
        name: str = "acme/support",
        *,
        channel: str | None = None,
        files: dict[str, str] | None = None,
        trained_on: BaseModel | None = None,
        **options: object,
    ) -> Record:
        number = next(count)
        folder = adapter_factory(f"adapter-{number}", **({"seed": number} | options))
        for file, text in (files or {}).items():
            (folder / file).write_text(text)
        record = registry.publish(draft(folder, base=trained_on or base), name=AdapterName.parse(name), author="tests")
        if channel:
            registry.set_channel(record.name, channel, {record.version: 100}, who="tests")
        return record

    return make


@pytest.fixture
def config(tmp_path: Path, tiny_base: Path, registry: Registry) -> ServeConfig:
    return ServeConfig(
        registry=registry.url,
        cache=tmp_path / "cache",
        base=tiny_base,
        base_name="tiny",
        host="127.0.0.1",
        port=8000,
        max_loras=2,
        max_cpu_loras=3,
        max_lora_rank=16,
    )


@pytest.fixture
def engine(config: ServeConfig) -> MemoryEngine:
    return MemoryEngine(config.max_cpu_loras)


@pytest.fixture
def replica(config: ServeConfig, registry: Registry, base: BaseModel, engine: MemoryEngine) -> Replica:
    """Ready, and not watching: tests say when to look."""
    replica = Replica(config, registry=registry, base=base, engine=engine)
    replica.not_ready = ""
    return replica
