"""``GET /metrics`` for one tenant: the samples that carry its name, and no others. Pure but for passing messages on.

What the engine tells of itself (its queue, its cache, the adapters of others) is for keys with the scope ``admin``.
"""

from __future__ import annotations

import re
from collections.abc import Awaitable, Callable, MutableMapping
from typing import Any

Message = MutableMapping[str, Any]
Send = Callable[[Message], Awaitable[None]]

_FAMILY = re.compile(r"# (?:HELP|TYPE) (\S+)")
_SAMPLE = re.compile(r"[A-Za-z_:][\w:]*\{(?P<labels>.*)\} \S+")


def of_tenant(text: str, tenant: str) -> str:
    """Of a page in Prometheus' text format, the samples with ``tenant="…"`` and their families' heads."""
    mine = re.compile(rf'(?:^|,)tenant="{re.escape(tenant)}"(?:,|$)')
    kept: list[str] = []
    heads: list[str] = []
    for line in text.splitlines():
        if _FAMILY.match(line):
            heads = [*heads, line] if heads and _name(heads[-1]) == _name(line) else [line]
        elif (sample := _SAMPLE.match(line)) and mine.search(sample["labels"]):
            kept += [*heads, line]
            heads = []
    return "\n".join([*kept, ""]) if kept else ""


def only(send: Send, tenant: str) -> Send:
    """``send`` for a page of metrics, of which only one tenant's go out."""
    start: Message = {}
    page = b""

    async def sending(message: Message) -> None:
        nonlocal start, page
        if message["type"] == "http.response.start":
            start = message
            return
        page += message.get("body", b"")
        if message.get("more_body"):
            return
        shown = of_tenant(page.decode("utf-8", "replace"), tenant).encode() if start["status"] == 200 else b""
        headers = [(name, value) for name, value in start.get("headers", ()) if name != b"content-length"]
        await send({**start, "headers": [*headers, (b"content-length", str(len(shown)).encode())]})
        await send({"type": "http.response.body", "body": shown})

    return sending


def _name(head: str) -> str:
    found = _FAMILY.match(head)
    assert found is not None, "only heads are kept"
    return found[1]
