"""API keys and what they stand for. Pure: no database, no clock.

    ah_5k2m9q…_Xf83…        shown once, when it is made
       │          └ secret   43 letters and digits: 256 bits
       └ id                  12 of them, no secret: it is in lists, logs and the bill

Stored is the SHA-256 of the whole text. That is enough for what nobody can guess; a slow hash is for passwords, and
would cost every request 100 ms here. `Directory` is all that a server needs to know who asks, at one moment.
"""

from __future__ import annotations

import hashlib
import hmac
import re
import secrets
import string
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from itertools import groupby

from adapterhub.errors import Unauthorized, UsageError
from adapterhub.refs import AdapterName
from adapterhub.serving.tenants.callers import NO_LIMITS, Caller, Limits, Scope

_ID = string.ascii_lowercase + string.digits
_SECRET = string.ascii_letters + string.digits
_KEY = re.compile(r"ah_([a-z0-9]{12})_[A-Za-z0-9]{43}")
_SPAN = re.compile(r"(\d{1,6})([smhdw])")
_UNITS = {"s": "seconds", "m": "minutes", "h": "hours", "d": "days", "w": "weeks"}
_NOBODY = hashlib.sha256(b"no key has this hash").digest()


@dataclass(frozen=True)
class Tenant:
    """Who owns adapters and holds keys."""

    name: str
    base: bool = True  # whether it may ask the base itself
    weight: float = 1.0
    limits: Limits = NO_LIMITS
    created: str = ""  # ISO 8601, UTC, as all times here


@dataclass(frozen=True)
class Key:
    """A key without its secret."""

    id: str
    tenant: str
    hash: bytes = field(repr=False)  # SHA-256 of the text
    scopes: frozenset[Scope]
    label: str = ""  # for people
    limits: Limits = NO_LIMITS
    created: str = ""
    expires: str | None = None
    revoked: str | None = None

    def problem(self, now: datetime) -> str:
        """Why it opens nothing any more; empty where it does."""
        if self.revoked is not None and datetime.fromisoformat(self.revoked) <= now:
            return "it was revoked"
        if self.expires is not None and datetime.fromisoformat(self.expires) <= now:
            return "it has expired"
        return ""


@dataclass(frozen=True)
class Share:
    """``tenant`` may use an adapter of another."""

    adapter: AdapterName
    tenant: str


@dataclass(frozen=True)
class Minted:
    """A new key: the one moment in which its text is known."""

    text: str = field(repr=False)
    id: str
    hash: bytes = field(repr=False)


def mint() -> Minted:
    """A new key from the system's random numbers."""
    key_id = "".join(secrets.choice(_ID) for _ in range(12))
    text = f"ah_{key_id}_{''.join(secrets.choice(_SECRET) for _ in range(43))}"
    return Minted(text, key_id, _hash(text))


def _hash(text: str) -> bytes:
    return hashlib.sha256(text.encode()).digest()


class Directory:
    """All tenants, keys and shares at one moment, ready to be asked."""

    def __init__(
        self, *, tenants: Iterable[Tenant] = (), keys: Iterable[Key] = (), shares: Iterable[Share] = ()
    ) -> None:
        self.tenants: Mapping[str, Tenant] = {tenant.name: tenant for tenant in tenants}
        shared = _by_tenant(shares)
        self._keys = {
            key.id: (key, _caller(self.tenants[key.tenant], key, shared.get(key.tenant, frozenset())))
            for key in keys
            if key.tenant in self.tenants
        }

    @property
    def opens(self) -> bool:
        """Whether any key is good now."""
        now = datetime.now(UTC)
        return any(not key.problem(now) for key, _ in self._keys.values())

    def caller(self, presented: str | None, *, now: datetime | None = None) -> Caller:
        """Whose key this is. Raises Unauthorized: the same for an unknown key and a wrong secret."""
        if not presented:
            raise Unauthorized("an API key is needed", why="send the header Authorization: Bearer ah_…")
        shape = _KEY.fullmatch(presented)
        key, caller = self._keys.get(shape[1] if shape else "", (None, None))
        # always one comparison, in constant time: how long a refusal takes tells nothing
        is_right = hmac.compare_digest(_hash(presented), key.hash if key else _NOBODY)
        if key is None or caller is None or not is_right:
            raise Unauthorized("the API key is not valid")
        if problem := key.problem(now or datetime.now(UTC)):
            raise Unauthorized("the API key is not valid any more", why=problem)
        return caller


def parse_when(text: str, *, now: datetime) -> datetime:
    """``30d``, ``12h`` … from ``now``, or a day or moment like ``2027-01-31``, in UTC. Raises UsageError."""
    if found := _SPAN.fullmatch(text.strip()):
        try:
            return now + timedelta(**{_UNITS[found[2]]: int(found[1])})
        except OverflowError as error:
            raise UsageError(f"{text!a} is too far away", hint="try 30d") from error
    try:
        when = datetime.fromisoformat(text.strip())
    except ValueError as error:
        raise UsageError(
            f"{text!a} is no time", why="it can be like 30d, 12h, 15m, 2w, or a day like 2027-01-31", hint="try 30d"
        ) from error
    return when if when.tzinfo else when.replace(tzinfo=UTC)


def _by_tenant(shares: Iterable[Share]) -> dict[str, frozenset[AdapterName]]:
    ordered = sorted(shares, key=lambda share: share.tenant)
    return {tenant: frozenset(s.adapter for s in group) for tenant, group in groupby(ordered, lambda s: s.tenant)}


def _caller(tenant: Tenant, key: Key, shared: frozenset[AdapterName]) -> Caller:
    return Caller(
        tenant=tenant.name,
        key=key.id,
        scopes=key.scopes,
        base=tenant.base,
        shared=shared,
        weight=tenant.weight,
        limits=tenant.limits,
        key_limits=key.limits,
    )


def presented_key(headers: Iterable[tuple[bytes, bytes]]) -> str | None:
    """The key in ``Authorization: Bearer`` or in Anthropic's ``x-api-key``; None where there is none.

    Raises Unauthorized where two differ: which of them would count must not be a matter of luck.
    """
    found = set()
    for name, value in headers:
        if name == b"x-api-key":
            found.add(value.strip())
        elif name == b"authorization":
            scheme, _, token = value.strip().partition(b" ")
            found.add(token.strip() if scheme.lower() == b"bearer" else value)
    if len(found) > 1:
        raise Unauthorized("two different API keys were sent", why="in Authorization and x-api-key, or twice")
    return found.pop().decode("latin-1") if found else None
