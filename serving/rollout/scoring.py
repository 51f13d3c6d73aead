"""Asks a version the prompts for its adapter, by this server's own way in, and scores the answers.

As the adapter's owner, so that they wait their turn in its line and take nothing of another's.
"""

from __future__ import annotations

import asyncio
import json
import logging
from pathlib import Path
from typing import Any

from adapterhub.errors import AdapterHubError, EngineError
from adapterhub.registry.base import Version
from adapterhub.serving.counting import ask_inside
from adapterhub.serving.rollout.promptset import Prompt, read_prompts
from adapterhub.serving.tenants.callers import CALLER, Caller

log = logging.getLogger(__name__)

_AT_ONCE = 4
_CHAT = "/v1/chat/completions"


class Scoring:
    """Scores of versions on one server. ``app`` is the whole application, its door included."""

    def __init__(self, app: Any, folder: Path | None) -> None:
        self._app = app
        self._folder = folder

    async def score(self, version: Version) -> float | None:
        """From 0 to 1; None where there are no prompts for the adapter.

        Raises DataError (of the prompts), EngineError (a prompt is not answered), RunFailed (a scorer of one's own).
        """
        if self._folder is None:
            return None
        prompts = await asyncio.to_thread(read_prompts, self._folder, version.record.name)
        if not prompts:
            return None
        gate = asyncio.Semaphore(_AT_ONCE)

        async def one(prompt: Prompt) -> float:
            async with gate:
                answer = await self._ask(version, prompt)
            return min(1.0, max(0.0, await asyncio.to_thread(prompt.scorer, answer, prompt.expected)))

        return sum(await asyncio.gather(*map(one, prompts))) / len(prompts)

    async def _ask(self, version: Version, prompt: Prompt) -> str:
        body = {
            "model": str(version.record.ref),
            "messages": list(prompt.messages),
            "max_tokens": prompt.max_tokens,
            "temperature": 0,
        }
        status, raw = await ask_inside(self._app, _scope(version.record.name.tenant), _CHAT, body)
        if status != 200:
            raise EngineError(f"{version.record.ref} cannot be scored", why=f"a prompt was answered with {status}")
        text: str = json.loads(raw)["choices"][0]["message"]["content"] or ""
        return text


async def try_again(scoring: Any, *, seconds: float) -> None:
    """Score the candidates that have callers, again and again, until cancelled. ``scoring`` does it once."""
    while True:
        await asyncio.sleep(seconds)
        try:
            await scoring()
        except AdapterHubError as error:
            log.warning("a candidate cannot be scored now: %s", error)


def _scope(tenant: str) -> dict[str, Any]:
    """Of a request that no network can send: it says itself who asks."""
    return {
        "type": "http",
        "asgi": {"version": "3.0"},
        "http_version": "1.1",
        "scheme": "http",
        "root_path": "",
        "client": None,
        "server": None,
        CALLER: Caller(tenant=tenant, key="scoring", base=False, scopes=frozenset({"inference"})),
    }
