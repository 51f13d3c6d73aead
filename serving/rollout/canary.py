"""Which of a channel's versions a caller gets, where it has several. Pure.

A caller's lot is a hash of adapter, channel, candidate and caller: it is the same on every replica and at every
request, and as a candidate's weight grows, callers only move in. A new candidate draws new lots, so it is not always
the same callers who go first.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from typing import Any

from adapterhub.refs import AdapterRef
from adapterhub.registry.base import Version

Share = tuple[Version, int]  # a version and its weight


def pick(shares: Sequence[Share], *, ref: AdapterRef, caller: str) -> Version:
    """The caller's version, of those that a channel points to.

    Older versions are asked last: the oldest gets those whom no newer one draws. Weights need not sum to 100: those of
    a version that cannot be used fall to the others.
    """
    newest_first = sorted(shares, key=lambda share: -share[0].record.version)
    left = sum(weight for _, weight in newest_first)
    for version, weight in newest_first[:-1]:
        if lot(ref, version.record.digest, caller) * left < weight:
            return version
        left -= weight
    return newest_first[-1][0]


def lot(ref: AdapterRef, digest: str, caller: str) -> float:
    """At least 0, below 1; evenly spread over callers."""
    text = "\0".join([str(ref), digest, caller])
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8]) / 2**64


def caller_of(body: Mapping[str, Any], *, key: str | None, tenant: str | None) -> str:
    """Who asks: the end user where the request names one, with the key or the tenant that asks for them.

    ``user`` and ``safety_identifier`` are OpenAI's, ``metadata.user_id`` is Anthropic's.
    """
    metadata = body.get("metadata")
    named = [body.get("safety_identifier"), body.get("user")]
    named.append(metadata.get("user_id") if isinstance(metadata, Mapping) else None)
    user = next((name for name in named if isinstance(name, str) and name), "")
    return "\0".join([tenant or "", user or key or ""])
