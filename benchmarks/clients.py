"""Clients for benchmarks: streamed answers, when each of their tokens came, from one event loop."""

from __future__ import annotations

import asyncio
import random
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from itertools import pairwise

import httpx
from engines import WORDS


@dataclass
class Stream:
    """One answer. Times in seconds, of `time.perf_counter`."""

    model: str
    asked: float
    status: int = 0
    tokens: list[float] = field(default_factory=list)

    @property
    def first(self) -> float:
        """Seconds to the first token."""
        return self.tokens[0] - self.asked

    @property
    def pauses(self) -> Iterator[tuple[float, float]]:
        """Before each token but the first: when it came, and the seconds since the one before."""
        return ((later, later - earlier) for earlier, later in pairwise(self.tokens))


async def ask(
    http: httpx.AsyncClient, model: str, *, words: int, tokens: int, seed: object, into: list[Stream] | None = None
) -> Stream:
    """A streamed greedy answer of ``tokens`` tokens to a prompt of random words, kept to its last byte.

    ``into`` gets it when it is asked for: what came of one that is broken off is there.
    """
    prompt = " ".join(random.Random(str(seed)).choices(WORDS, k=words))
    body = {"model": model, "messages": [{"role": "user", "content": prompt}], "max_tokens": tokens, "stream": True}
    stream = Stream(model, time.perf_counter())
    if into is not None:
        into.append(stream)
    options = {"temperature": 0, "ignore_eos": True}
    async with http.stream("POST", "/v1/chat/completions", json=body | options) as answer:
        stream.status = answer.status_code
        async for line in answer.aiter_lines():
            if line.startswith("data: {") and '"role"' not in line:
                stream.tokens.append(time.perf_counter())
    return stream


def many(url: str, headers: Mapping[str, str] | None = None) -> httpx.AsyncClient:
    """For any number of clients."""
    limits = httpx.Limits(max_connections=None)
    return httpx.AsyncClient(base_url=url, headers=headers, timeout=600, limits=limits, trust_env=False)


async def crowd(
    url: str,
    *,
    clients: int,
    requests: int,
    model: Callable[[int], str],
    words: int,
    tokens: int,
    headers: Mapping[str, str] | None = None,
    seed: int = 0,
) -> tuple[list[Stream], float]:
    """So many clients ask ``requests`` questions between them, each at once after its last; and the seconds it took."""
    numbers = iter(range(requests))
    streams: list[Stream] = []
    async with many(url, headers) as http:

        async def client() -> None:
            for number in numbers:
                streams.append(await ask(http, model(number), words=words, tokens=tokens, seed=seed + number))

        begun = time.perf_counter()
        await asyncio.gather(*(client() for _ in range(clients)))
        return streams, time.perf_counter() - begun


def quantile(values: list[float], share: float) -> float:
    """The value that ``share`` of them are not above."""
    return sorted(values)[min(len(values) - 1, int(share * len(values)))]
