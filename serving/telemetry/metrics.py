"""What Prometheus is told, besides what vLLM tells of itself. Every name begins with ``adapterhub_``.

Labels are bounded: at most `TENANTS` tenants by name, the rest together as ``(other)``; routes, outcomes, reasons,
spans and tiers are ours. Adapters are labels only where an operator asked for it, and at most `ADAPTERS` of them.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram

OTHER = "(other)"
TENANTS = 200
ADAPTERS = 50
_SHORT = (0.0001, 0.00025, 0.0005, 0.001, 0.0015, 0.0025, 0.005, 0.01, 0.025, 0.1, 1)
_GAPS = (0.005, 0.01, 0.02, 0.03, 0.05, 0.075, 0.1, 0.15, 0.25, 0.5, 1, 2.5, 10)
_WAITS = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120)


class Metrics:
    """The families, and the few ways to change them."""

    def __init__(self, registry: CollectorRegistry, *, adapters: int = 0) -> None:
        """``adapters``: how many of them become labels."""

        def counter(name: str, what: str, *labels: str) -> Counter:
            return Counter(f"adapterhub_{name}", what, labels, registry=registry)

        def gauge(name: str, what: str) -> Gauge:
            return Gauge(f"adapterhub_{name}", what, registry=registry)

        def histogram(name: str, what: str, buckets: tuple[float, ...], *labels: str) -> Histogram:
            return Histogram(f"adapterhub_{name}", what, labels, buckets=buckets, registry=registry)

        self._tenants = Bounded(TENANTS)
        self._adapters = Bounded(adapters)
        self.tells_adapters = adapters > 0
        self.requests = counter("requests", "Requests for a model, by how they ended.", "tenant", "route", "outcome")
        self.rejections = counter("rejections", "Requests refused before the engine.", "tenant", "reason")
        self.tokens = counter("tokens", "Tokens: in, out, and those of in that were cached.", "tenant", "kind")
        self.adapter_tokens = counter("adapter_tokens", "Tokens by adapter, where that is on.", "adapter", "kind")
        self.first_token = histogram("first_token_seconds", "From a request to its first token.", _WAITS, "tenant")
        self.inter_token = histogram("inter_token_seconds", "Between the tokens of a stream.", _GAPS, "tenant")
        self.queue = histogram("queue_seconds", "Waiting for the turn at the engine.", _WAITS, "tenant")
        self.ours = histogram("middleware_seconds", "Time spent in AdapterHub's own code, by span.", _SHORT, "span")
        self.loads = histogram("load_seconds", "Bringing an adapter into the engine, by whence.", _WAITS, "tier")
        self.failed_loads = counter("failed_loads", "Adapters that could not be brought into the engine.")
        self.swaps = counter("swaps", "Adapters forgotten to make room for another.")
        self.resident = gauge("resident_adapters", "Adapter versions in the engine's memory.")
        self.places = gauge("adapter_places", "Adapter versions that fit into it.")
        self.running = gauge("running_requests", "Requests in the engine.")
        self.waiting = gauge("waiting_requests", "Requests that wait for their turn.")
        self.cache_bytes = gauge("cache_bytes", "Local copies of adapters, in bytes.")
        self.ledger_lag = gauge("ledger_lag_seconds", "Since all usage was in the database.")
        self.registry_away = gauge("registry_away", "1 while the registry cannot be read.")
        self.keys_away = gauge("keys_away", "1 while tenants and keys cannot be read.")
        self.ready = gauge("ready", "1 while requests are answered.")
        # a child of a family costs a lock and a dictionary each time it is looked up
        self.of_request = cache(
            lambda tenant, route, outcome: self.requests.labels(self.tenant(tenant), route, outcome)
        )
        self.of_tenant: Callable[[str | None], TenantMetrics] = cache(lambda tenant: TenantMetrics(self, tenant))
        self.of_span = cache(lambda span: self.ours.labels(span))

    def tenant(self, tenant: str | None) -> str:
        return self._tenants.label(tenant or "")

    def adapter(self, adapter: str) -> str:
        return self._adapters.label(adapter)


class TenantMetrics:
    """One tenant's part of the families that change with every request."""

    def __init__(self, metrics: Metrics, tenant: str | None) -> None:
        label = metrics.tenant(tenant)
        self.tokens_in = metrics.tokens.labels(label, "in")
        self.tokens_out = metrics.tokens.labels(label, "out")
        self.tokens_cached = metrics.tokens.labels(label, "cached")
        self.first_token = metrics.first_token.labels(label)
        self.inter_token = metrics.inter_token.labels(label)
        self.queue = metrics.queue.labels(label)


class Bounded:
    """The first so many values are labels of their own."""

    def __init__(self, most: int) -> None:
        self._most = most
        self._known: set[Any] = set()

    def label(self, value: str) -> str:
        if value not in self._known:
            if len(self._known) >= self._most:
                return OTHER
            self._known.add(value)
        return value
