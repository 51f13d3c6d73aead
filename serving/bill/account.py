"""The tokens of one request, counted where the engine hands them out: prompt, answers, and what its cache knew.

    account = Account()
    with account.open():                        # whatever the engine runs for this request, in whatever task …
        await app(scope, receive, send)
    await account.over()                        # … is in here, also where its client left in the middle

Not from the answer's ``usage``: a stream has none unless it is asked for, one that is broken off never gets to it, and
every route writes it otherwise (decision record 0046). `metered` makes an engine's client count.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncGenerator, Callable, Iterator
from contextvars import ContextVar
from typing import Any

ABORT_SECONDS = 5.0  # that an engine gets to end what was broken off, before its tokens are left out

_CURRENT: ContextVar[Account | None] = ContextVar("adapterhub_account", default=None)


class Account:
    """Of one request. One event loop; not for threads."""

    def __init__(self, *, came: Callable[[int], None] = lambda tokens: None) -> None:
        """``came`` is told of new tokens of the answer as they come."""
        self.tokens_in = 0
        self.tokens_out = 0
        self.tokens_cached = 0
        self.came = came
        self._runs = 0  # of the engine, not over yet
        self._over: asyncio.Future[None] | None = None

    @property
    def tokens(self) -> int:
        return self.tokens_in + self.tokens_out

    @contextlib.contextmanager
    def open(self) -> Iterator[None]:
        """Around the request."""
        token = _CURRENT.set(self)
        try:
            yield
        finally:
            _CURRENT.reset(token)

    async def over(self, *, within: float = ABORT_SECONDS) -> None:
        """Until nothing more can come: a run that is broken off ends a moment after its client left."""
        if self._runs:
            self._over = asyncio.get_running_loop().create_future()
            await asyncio.wait([self._over], timeout=within)

    def _begin(self) -> None:
        self._runs += 1

    def _end(self) -> None:
        self._runs -= 1
        if not self._runs and self._over is not None and not self._over.done():
            self._over.set_result(None)


class _Run:
    """One run of the engine for a request: one prompt, and one or more answers to it."""

    def __init__(self, account: Account, *, answers: bool, cumulative: bool) -> None:
        """``answers``: whether it generates. ``cumulative``: whether each of its outputs has all tokens so far."""
        self.collector: Any = None  # where the engine puts its outputs
        self._account = account
        self._answers = answers
        self._cumulative = cumulative
        self._has_prompt = False
        self._seen: dict[int, int] = {}  # answer → tokens

    def saw(self, output: Any) -> None:
        """``output`` is vLLM's RequestOutput or PoolingRequestOutput."""
        account = self._account
        if not self._has_prompt:
            self._has_prompt = True
            account.tokens_in += len(output.prompt_token_ids or ())
            account.tokens_cached += output.num_cached_tokens or 0
        for answer in output.outputs if self._answers else ():
            new = len(answer.token_ids)
            if self._cumulative:
                new, self._seen[answer.index] = new - self._seen.get(answer.index, 0), new
            if new:
                account.tokens_out += new
                account.came(new)

    async def outputs(self, source: AsyncGenerator[Any, None]) -> AsyncGenerator[Any, None]:
        """Those of ``source``, counted; and what it had when it was broken off."""
        self._account._begin()
        try:
            token = _RUN.set(self)
            try:
                output = await anext(source, None)  # adds the request: in here, and in this context
            finally:
                _RUN.reset(token)
            while output is not None:
                self.saw(output)
                yield output
                output = await anext(source, None)
        finally:
            try:
                await source.aclose()
                self._take_rest()
            finally:
                self._account._end()

    def _take_rest(self) -> None:
        """What the engine had made and nobody took: with an abort it puts a last output there."""
        try:
            rest = self.collector.get_nowait() if self.collector is not None else None
        except Exception:  # noqa: BLE001 - it holds the error that ended the run, which its caller has got
            return
        if rest is not None:
            self.saw(rest)


_RUN: ContextVar[_Run | None] = ContextVar("adapterhub_run", default=None)  # whose request is being added


def metered(client: Any) -> None:
    """From now on ``client`` (vLLM's AsyncLLM) counts what it makes to the account that is open around it.

    Its three methods are replaced on this one object; who calls them sees no difference. ``add_request`` gives the
    place where an answer that is broken off can be had: of a whole one (not streamed) nothing came out before.
    """
    generate, encode, add_request = client.generate, client.encode, client.add_request

    async def adding(*args: Any, **options: Any) -> Any:
        collector = await add_request(*args, **options)
        if (run := _RUN.get()) is not None:
            run.collector = collector
        return collector

    def generating(*args: Any, **options: Any) -> Any:
        source, account = generate(*args, **options), _CURRENT.get()
        if account is None:
            return source
        params = options["sampling_params"] if "sampling_params" in options else args[1]
        return _Run(account, answers=True, cumulative=params.output_kind.name == "CUMULATIVE").outputs(source)

    def encoding(*args: Any, **options: Any) -> Any:
        source, account = encode(*args, **options), _CURRENT.get()
        return source if account is None else _Run(account, answers=False, cumulative=False).outputs(source)

    client.generate, client.encode, client.add_request = generating, encoding, adding
