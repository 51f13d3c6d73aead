"""Tokens are counted where the engine hands them out: whatever the route, the stream, and however it ends."""

from __future__ import annotations

import asyncio
import contextlib
from types import SimpleNamespace
from typing import Any

import pytest

from adapterhub.serving.bill.account import Account

pytestmark = pytest.mark.anyio
PROMPT = [1, 2, 3, 4]


def params(kind: str, *, n: int = 1, tokens: int = 5) -> Any:
    return SimpleNamespace(output_kind=SimpleNamespace(name=kind), n=n, max_tokens=tokens)


async def drain(source: Any) -> None:
    async for _ in source:
        pass


def counted(account: Account) -> tuple[int, int, int]:
    return account.tokens_in, account.tokens_out, account.tokens_cached


@pytest.mark.parametrize("kind", ["DELTA", "FINAL_ONLY", "CUMULATIVE"])
@pytest.mark.parametrize("n", [1, 3])
async def test_a_whole_answer(token_engine: Any, kind: str, n: int) -> None:
    account, came = Account(), []
    account.came = came.append
    token_engine.cached = 2
    with account.open():
        await drain(token_engine.generate(PROMPT, params(kind, n=n), "r"))
    assert counted(account) == (4, 5 * n, 2)
    assert sum(came) == 5 * n


async def test_several_prompts_each_in_a_task_of_its_own_and_one_embedding(token_engine: Any) -> None:
    account = Account()
    with account.open():
        runs = [token_engine.generate(PROMPT, sampling_params=params("DELTA"), request_id="same") for _ in range(3)]
        await asyncio.gather(*(asyncio.create_task(drain(run)) for run in runs))
        await drain(token_engine.encode(prompt=PROMPT, pooling_params=None, request_id="e"))
    assert counted(account) == (16, 15, 0)


@pytest.mark.parametrize("kind", ["DELTA", "FINAL_ONLY", "CUMULATIVE"])
@pytest.mark.parametrize("how", ["cancelled", "closed", "never begun"])
async def test_an_answer_that_is_broken_off(token_engine: Any, kind: str, how: str) -> None:
    """What had been made until then counts, also where nothing of it came out."""
    account = Account()
    with account.open():
        source = token_engine.generate(PROMPT, params(kind, tokens=1000), "r")
        if how == "never begun":
            await source.aclose()
            await account.over()
            assert counted(account) == (0, 0, 0)
            return
        if how == "closed" and kind != "FINAL_ONLY":
            for _ in range(3):
                await anext(source)
            await source.aclose()
            assert counted(account) == (4, 3, 0)
        else:
            task = asyncio.create_task(drain(source))
            for _ in range(20):
                await asyncio.sleep(0)
            task.cancel()
            await account.over()
            with contextlib.suppress(asyncio.CancelledError):
                await task
            assert account.tokens_in == 4 and account.tokens_out > 0
    assert token_engine.aborted == ["r"]


async def test_it_is_waited_for_until_what_was_broken_off_has_ended(token_engine: Any) -> None:
    account = Account()
    with account.open():
        task = asyncio.create_task(drain(token_engine.generate(PROMPT, params("FINAL_ONLY", tokens=1000), "r")))
        for _ in range(9):
            await asyncio.sleep(0)
        task.cancel()  # as vLLM does when its client leaves: it is not waited for
    assert account.tokens_out == 0
    await account.over()
    assert account.tokens_out > 0


async def test_an_engine_that_breaks_ends_the_run(token_engine: Any) -> None:
    account = Account()
    token_engine.failure = RuntimeError("no memory")
    with account.open(), pytest.raises(RuntimeError, match="no memory"):
        await drain(token_engine.generate(PROMPT, params("DELTA"), "r"))
    await account.over()
    assert counted(account) == (0, 0, 0)


async def test_what_nobody_asked_for_counts_for_nobody(token_engine: Any) -> None:
    account = Account()
    with account.open():
        pass
    await drain(token_engine.generate(PROMPT, params("DELTA"), "selftest"))
    assert counted(account) == (0, 0, 0)


async def test_two_requests_at_once_are_kept_apart(token_engine: Any) -> None:
    async def request(tokens: int) -> Account:
        account = Account()
        with account.open():
            await drain(token_engine.generate(PROMPT[:tokens], params("DELTA", tokens=tokens), "same"))
        return account

    accounts = await asyncio.gather(*(asyncio.create_task(request(tokens)) for tokens in (1, 2, 3)))
    assert [counted(account) for account in accounts] == [(1, 1, 0), (2, 2, 0), (3, 3, 0)]
