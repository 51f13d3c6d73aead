"""The way of a version into vLLM and out again: an immutable name and a verified folder → a `LoRARequest`.

vLLM asks a resolver for names that it has not loaded. Ours answers only for the version that residency is loading at
this moment: nothing that a client writes becomes a path. `VllmEngine` asks vLLM to resolve, because that works
without the switch that would open vLLM's own routes for loading adapters.
"""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

from vllm.lora.request import LoRARequest
from vllm.lora.resolver import LoRAResolver, LoRAResolverRegistry
from vllm.v1.engine.exceptions import EngineDeadError

from adapterhub.errors import EngineError, EngineRefused

log = logging.getLogger(__name__)

NAME = "adapterhub"


class Resolver(LoRAResolver):  # type: ignore[misc]  # vllm is untyped here
    """Name → request, for the names in `paths`."""

    def __init__(self) -> None:
        self.paths: dict[str, Path] = {}  # being loaded now
        self.requests: dict[str, Any] = {}  # the last request made for each of them

    async def resolve_lora(self, base_model_name: str, lora_name: str) -> LoRARequest | None:
        path = self.paths.get(lora_name)
        if path is None:
            return None
        # vLLM replaces the id with its own; 1 is only a value that it accepts
        request = LoRARequest(lora_name=lora_name, lora_int_id=1, lora_path=str(path))
        self.requests[lora_name] = request
        return request


def register() -> None:
    """Known to vLLM from now on. Safe to call again."""
    if NAME not in LoRAResolverRegistry.get_supported_resolvers():
        LoRAResolverRegistry.register_resolver(NAME, Resolver())


def registered() -> Resolver:
    """The resolver of this process. Raises KeyError where `register` did not run."""
    resolver: Resolver = LoRAResolverRegistry.get_resolver(NAME)
    return resolver


class VllmEngine:
    """vLLM as `residency.Engine`."""

    def __init__(self, client: Any, models: Any, *, resolver: Resolver) -> None:
        """``client`` is vLLM's AsyncLLM, ``models`` its OpenAIServingModels."""
        self._client = client
        self._models = models
        self._resolver = resolver

    async def load(self, name: str, path: Path) -> None:
        """Raises EngineRefused where vLLM does not take it, EngineError where it ended."""
        self._resolver.paths[name] = path
        try:
            answer = await self._models.resolve_lora(name)
        except EngineDeadError as error:
            raise EngineError(f"{name} cannot be loaded", why="the engine ended") from error
        finally:
            del self._resolver.paths[name]
            request = self._resolver.requests.pop(name, None)
        if isinstance(answer, LoRARequest):
            log.info("loaded %s", name)
            return
        if self.is_dead:
            raise EngineError(f"{name} cannot be loaded", why="the engine ended")
        if request is not None:
            await self._client.remove_lora(request.lora_int_id)  # it may be half in
        raise EngineRefused(f"{name} cannot be loaded", why="the engine refuses it; its log says why")

    async def beat(self) -> None:
        """It looks for such calls between two steps. Raises EngineError."""
        try:
            await self._client.list_loras()
        except EngineDeadError as error:
            raise EngineError("the engine ended") from error

    @property
    def is_dead(self) -> bool:
        return bool(self._client.errored)

    async def forget(self, name: str) -> None:
        request = self._models.lora_requests.pop(name)
        self._models.lora_resolver_lock.pop(name, None)  # vLLM keeps one for each name for ever
        await self._client.remove_lora(request.lora_int_id)
        log.info("forgot %s", name)
