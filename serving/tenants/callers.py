"""Who asks, and what they may: the one value that everything behind the door decides by.

    Authorization: Bearer ah_…  ──►  keys.Directory.caller()  ──►  Caller  ──►  tenancy, limits, fairness, usage

Without keys there is one caller, `SINGLE_USER`, who may do everything, on loopback alone.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass, fields
from functools import cached_property
from typing import Literal, get_args

from adapterhub.errors import Forbidden, UsageError
from adapterhub.refs import AdapterName

Scope = Literal["inference", "channels", "admin"]
CALLER = "adapterhub.caller"  # where our own routes find theirs in the ASGI scope
SCOPES: frozenset[Scope] = frozenset(get_args(Scope))


@dataclass(frozen=True)
class Limits:
    """What one tenant, or one key, may take. None: nothing of its own; what the server can do is the limit."""

    requests_per_minute: int | None = None
    tokens_per_minute: int | None = None  # prompt and answer together
    concurrency: int | None = None  # requests at once
    queue: int | None = None  # requests that wait for their turn
    context: int | None = None  # tokens of a prompt with its answer
    output: int | None = None  # tokens of one answer
    adapters: int | None = None  # versions of the tenant's own that are loaded at once

    def __post_init__(self) -> None:
        for field in fields(self):
            value = getattr(self, field.name)
            least = 0 if field.name == "queue" else 1
            if value is not None and (type(value) is not int or value < least):
                raise UsageError(
                    f"{field.name.replace('_', '-')} {value!a} is no limit",
                    why=f"a whole number from {least} up",
                )


NO_LIMITS = Limits()


What = Literal["requests", "tokens"]


@dataclass(frozen=True)
class Subject:
    """Whose minute is counted: a tenant's, or one key's."""

    kind: Literal["tenant", "key"]
    name: str
    limits: Limits

    def per_minute(self, what: What) -> int | None:
        return self.limits.requests_per_minute if what == "requests" else self.limits.tokens_per_minute

    @cached_property
    def id(self) -> str:
        return f"{self.kind}/{self.name}"


@dataclass(frozen=True)
class Caller:
    """Who asks. ``tenant`` is None for the one user of a server without keys."""

    tenant: str | None
    key: str | None = None  # its id, which is no secret
    scopes: frozenset[Scope] = SCOPES
    base: bool = True  # whether the base itself may be asked
    shared: frozenset[AdapterName] = frozenset()  # adapters of other tenants
    weight: float = 1.0  # share of the engine where tenants compete, against the others' weights
    limits: Limits = NO_LIMITS  # the tenant's, over all its keys
    key_limits: Limits = NO_LIMITS  # this key's

    @cached_property
    def subjects(self) -> tuple[Subject, ...]:
        """The key first: what it may not take is not taken from its tenant. Nobody without keys."""
        if self.tenant is None or self.key is None:
            return ()
        return (Subject("key", self.key, self.key_limits), Subject("tenant", self.tenant, self.limits))

    def may_use(self, name: AdapterName) -> bool:
        return self.tenant is None or self.tenant == name.tenant or name in self.shared

    def owns(self, name: AdapterName) -> bool:
        return self.tenant is None or self.tenant == name.tenant

    def check_scope(self, scope: Scope) -> None:
        """Raises Forbidden."""
        if scope not in self.scopes:
            raise Forbidden("this key may not do that", why=f"it needs the scope {scope!r}")

    @cached_property
    def _usual_salt(self) -> str:
        return self._salted(None)

    def salt(self, own: str | None) -> str:
        """The prefix cache's salt: no two tenants share one, whatever ``own`` salt they send."""
        return self._usual_salt if own is None else self._salted(own)

    def _salted(self, own: str | None) -> str:
        return hashlib.sha256(json.dumps([self.tenant, own]).encode()).hexdigest()

    def least(self, limit: str) -> int | None:
        """The tighter of the tenant's and the key's own limit of that name."""
        both = (getattr(self.limits, limit), getattr(self.key_limits, limit))
        return min((value for value in both if value is not None), default=None)


SINGLE_USER = Caller(tenant=None)
