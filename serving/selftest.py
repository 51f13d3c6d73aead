"""What a replica proves before it calls itself ready: it is protected, and adapters do not leak into the base.

`check_shield` asks for routes that must not be there. `check_batching` fills every slot of the engine with an adapter
that changes the answers plainly, and compares what the base says alone and beside one: an engine whose LoRA product
is wrong (as vLLM's own on CPU) answers the base with somebody's adapter.
"""

from __future__ import annotations

import asyncio
import json
import logging
import re
import tempfile
import uuid
from pathlib import Path
from typing import Any

import httpx
import numpy as np
from safetensors.numpy import save_file

from adapterhub.base import BaseModel
from adapterhub.errors import EngineError
from adapterhub.serving.bill.account import Account
from adapterhub.serving.config import ServeConfig

log = logging.getLogger(__name__)

_FORBIDDEN = (("GET", "/metrics"), ("POST", "/v1/load_lora_adapter"), ("POST", "/adapters"), ("POST", "/invocations"))
_TARGET = re.compile(r"(?!.*\bexperts\b).*\blayers\.[01]\..*(o_proj|down_proj)")
_RANK = 1  # fits every --max-lora-rank
_SCALE = 64
_TOKENS = 16  # of the prompt
_LIKELIEST = 20  # tokens whose probabilities are compared: what vLLM gives by default
_EFFECT = 0.2  # nats: the least that the probe must change
_FIRST_ID = 1_000_000_000  # vLLM counts adapter ids from 1; ours are far from them and gone before the first request


async def check_shield(app: Any) -> None:
    """Raises EngineError unless requests go through the middleware before anything else."""
    transport = httpx.ASGITransport(app=app)
    async with httpx.AsyncClient(transport=transport, base_url="http://localhost") as client:
        for method, path in _FORBIDDEN:
            answer = await client.request(method, path, headers={"x-request-id": "selftest"}, json={})
            # 503: the middleware answered, and knows that the replica is not ready yet
            if answer.status_code not in (404, 503) or answer.headers.get("x-request-id") != "selftest":
                raise EngineError(
                    f"{method} {path} is open", why="the tenancy middleware is not in place", hint="use `ah serve`"
                )


async def check_batching(client: Any, *, base: BaseModel, config: ServeConfig) -> None:
    """Raises EngineError where the base answers otherwise beside an adapter than alone. ``client`` is AsyncLLM."""
    targets = targets_of(base)
    if not targets or client.vllm_config.scheduler_config.max_num_seqs < 2:
        reason = "nothing shares a batch" if targets else "it knows no layer of this model"
        log.warning("the self-test does not compare base and adapters: %s", reason)
        return
    with tempfile.TemporaryDirectory(prefix="adapterhub-selftest-") as folder:
        write_probe(Path(folder), targets)
        probes = [_request(i, folder) for i in range(config.max_loras)]
        try:
            for probe in probes:  # every slot is taken: whichever a wrong product picks, it shows
                await client.add_lora(probe)
            await _compare(client, probes[0], vocabulary=int(base.config["vocab_size"]))
        finally:
            for probe in probes:
                await client.remove_lora(probe.lora_int_id)


async def check_meter(client: Any, *, base: BaseModel) -> None:
    """Raises EngineError where tokens are not counted: what cannot be billed is not served. ``client`` is AsyncLLM."""
    account, prompt = Account(), _prompt(int(base.config["vocab_size"]))
    with account.open():
        await _first_token(client, prompt, None)
    counted = (account.tokens_in, account.tokens_out)
    if counted != (_TOKENS, 1):
        raise EngineError("usage is not counted", why=f"of {_TOKENS} tokens in and 1 out it saw {counted}")


def _prompt(vocabulary: int) -> list[int]:
    return [(97 * i + 11) % vocabulary for i in range(_TOKENS)]


async def _compare(client: Any, probe: Any, *, vocabulary: int) -> None:
    prompt = _prompt(vocabulary)
    alone = await _first_token(client, prompt, None)
    adapted = await _first_token(client, prompt, probe)
    stream = _Stream(client, prompt, probe)
    try:
        await stream.started()
        beside = await _first_token(client, prompt, None)
        still_running = stream.is_running
    finally:
        await stream.stop()
    effect, leak = distance(alone, adapted), distance(alone, beside)
    log.info("self-test: an adapter moves the first token by %.2f nats, and the base beside it by %.5f", effect, leak)
    if not still_running or effect < _EFFECT:
        raise EngineError(
            "the self-test proves nothing",
            why=f"an adapter moves the first token by {effect:.3f} nats; still running beside it: {still_running}",
        )
    if leak > effect / 2:  # a leak is the whole effect; what is far less is rounding
        raise EngineError(
            "the base is answered with an adapter when they share a batch",
            why=f"its first token moves by {leak:.3f} nats, the adapter's own by {effect:.3f}",
            hint="start the server with `ah serve`",
        )


async def _first_token(client: Any, prompt: list[int], lora: Any) -> dict[int, float]:
    """The likeliest first tokens of an answer: id → log probability."""
    from vllm import SamplingParams

    params = SamplingParams(max_tokens=1, temperature=0, logprobs=_LIKELIEST)
    last = None
    async for output in client.generate(_tokens(prompt), params, f"selftest-{uuid.uuid4().hex}", lora_request=lora):
        last = output
    assert last is not None, "a request without an answer"
    return {token: entry.logprob for token, entry in last.outputs[0].logprobs[0].items()}


def distance(one: dict[int, float], other: dict[int, float]) -> float:
    """Mean difference of log probability (nats) over the tokens of ``one``; at least that, where ``other`` has less."""
    floor = min(other.values())
    return sum(abs(value - other.get(token, floor)) for token, value in one.items()) / len(one)


class _Stream:
    """An answer under way with one adapter, until it is stopped."""

    def __init__(self, client: Any, prompt: list[int], lora: Any) -> None:
        self._first = asyncio.Event()
        self._task = asyncio.create_task(self._run(client, prompt, lora))

    @property
    def is_running(self) -> bool:
        return not self._task.done()

    async def _run(self, client: Any, prompt: list[int], lora: Any) -> None:
        from vllm import SamplingParams

        params = SamplingParams(max_tokens=10_000, temperature=0, ignore_eos=True)
        async for _ in client.generate(_tokens(prompt), params, f"selftest-{lora.lora_name}", lora_request=lora):
            self._first.set()

    async def started(self) -> None:
        waiting = asyncio.create_task(self._first.wait())
        await asyncio.wait([waiting, self._task], return_when=asyncio.FIRST_COMPLETED)
        waiting.cancel()
        if self._task.done():
            await self._task

    async def stop(self) -> None:
        self._task.cancel()
        await asyncio.gather(self._task, return_exceptions=True)


def targets_of(base: BaseModel) -> dict[str, tuple[int, int]]:
    """Module → (out, in) of some layers near the input."""
    return {
        name.removesuffix(".weight"): (tensor.shape[0], tensor.shape[1])
        for name, (_, tensor) in base.tensors.items()
        if name.endswith(".weight")
        and tensor.dtype in ("F32", "F16", "BF16")
        and len(tensor.shape) == 2
        and _TARGET.fullmatch(name.removesuffix(".weight"))
    }


def write_probe(folder: Path, targets: dict[str, tuple[int, int]]) -> None:
    """A random adapter of rank 1 that nobody could take for none."""
    rng = np.random.default_rng(0)
    tensors = {}
    for module, (out, width) in targets.items():
        name = f"base_model.model.{module}"
        tensors[f"{name}.lora_A.weight"] = rng.normal(0, width**-0.5, (_RANK, width)).astype(np.float32)
        tensors[f"{name}.lora_B.weight"] = rng.normal(0, 1, (out, _RANK)).astype(np.float32)
    settings = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "r": _RANK,
        "lora_alpha": _SCALE * _RANK,
        "target_modules": sorted({module.rsplit(".", 1)[-1] for module in targets}),
        "bias": "none",
    }
    (folder / "adapter_config.json").write_text(json.dumps(settings))
    save_file(tensors, folder / "adapter_model.safetensors")


def _tokens(prompt: list[int]) -> Any:
    from vllm.inputs.engine import tokens_input

    return tokens_input(prompt)


def _request(number: int, folder: str) -> Any:
    from vllm.lora.request import LoRARequest

    return LoRARequest(lora_name=f"selftest-{number}", lora_int_id=_FIRST_ID + number, lora_path=folder)
