"""A request's way to its turn at the engine: a slot of the caller's, then the line; no longer than its client waits."""

from __future__ import annotations

import asyncio
import contextlib
from typing import Any

from adapterhub.refs import AdapterRef
from adapterhub.serving.admission.admission import Turn, sequences
from adapterhub.serving.admission.fairness import Ask
from adapterhub.serving.arguments import BASE_NAME
from adapterhub.serving.replica import Replica
from adapterhub.serving.tenants.callers import Caller
from adapterhub.serving.wire import ClientLeft, Message, Receive

_AT_ONCE = 0.005  # seconds: a request whose turn comes later than that has waited


def ask_of(
    caller: Caller, ref: AdapterRef | None, body: dict[str, Any], model: str, *, since: float, prompt: int
) -> Ask:
    """What a request wants of the engine; ``prompt`` in tokens, about.

    Without keys everybody is one tenant: then an adapter's owner counts. ``since`` is when it came, by the clock of
    admission: who waited for a load does not stand behind those who came meanwhile and found theirs loaded.
    """
    return Ask(
        tenant=caller.tenant or (ref.name.tenant if ref else BASE_NAME),
        adapter=model if ref else None,
        since=since,
        prompt=prompt,
        sequences=sequences(body),
        weight=caller.weight,
    )


async def take_turn(
    replica: Replica, caller: Caller, ask: Ask, until_the_last_byte: contextlib.AsyncExitStack, receive: Receive
) -> tuple[Turn, Receive]:
    """Wait for the engine, and no longer than the client does. Raises ClientLeft, TooManyRequests.

    What was heard of the client meanwhile is said again to the engine.
    """
    if replica.quota.is_free(caller) and (turn := replica.admission.take_at_once(ask)):
        until_the_last_byte.callback(replica.admission.give_back, turn)
        until_the_last_byte.callback(await replica.quota.take_slot(caller))  # at once: it is free
        return turn, receive
    entering = asyncio.ensure_future(_enter(replica, caller, ask, until_the_last_byte))
    leaving = asyncio.ensure_future(receive())
    until_the_last_byte.callback(leaving.cancel)
    both = {entering, leaving}
    try:
        await asyncio.wait(both, timeout=_AT_ONCE, return_when=asyncio.FIRST_COMPLETED)
        if not entering.done():
            with replica.quota.waiting(caller):
                await asyncio.wait(both, return_when=asyncio.FIRST_COMPLETED)
    finally:
        if not entering.done():
            entering.cancel()
            await asyncio.gather(entering, return_exceptions=True)
    if entering.cancelled():
        raise ClientLeft
    heard = [leaving]

    async def receiving() -> Message:
        return await (heard.pop() if heard else receive())

    return entering.result(), receiving


async def _enter(replica: Replica, caller: Caller, ask: Ask, until_the_last_byte: contextlib.AsyncExitStack) -> Turn:
    until_the_last_byte.callback(await replica.quota.take_slot(caller))
    turn = await replica.admission.take(ask)
    until_the_last_byte.callback(replica.admission.give_back, turn)
    return turn
