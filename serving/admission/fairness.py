"""Whose request goes to the engine next: token counters, one line a tenant, and a window. No I/O, no clock.

Virtual token counters (Sheng et al., "Fairness in Serving Large Language Models", OSDI'24, algorithm 2, with the
weights of section 4.2 and the predicted lengths of section 4.3): a tenant's counter grows by what it was served, and
the tenant with the least goes next. One that was away comes back at the least counter of those who wait, so nobody
saves up. Of two tenants that always have requests waiting, neither gets more than the other by more than twice what
fits into the window, however long that goes on.

The window is what the engine has: sequences, cache, and slots for different adapters. Three rules beyond the counters:

- A sequence stays free for each tenant that asked a moment ago and has none running now, against those that have
  some: a tenant with one client does not wait for a long answer of somebody else's to end. At most half of them.
- A request whose adapter needs a slot that is not free is passed over, but only up to `Window.patience`. Then one
  adapter that has had a slot for as long gets no new requests until it is free: that with the fewest under way. Before
  that all who wait for it go with it: closed at once, each would hold its slot for a single request.
- A request that does not fit is not passed over by smaller ones of tenants that were served more.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable
from dataclasses import dataclass

INPUT_COST, OUTPUT_COST = 1, 2  # of a token; a generated one takes a step of its own (OSDI'24, section 3.1)
MEMORY = 0.9  # share of the old in the mean length of a tenant's answers


@dataclass(frozen=True)
class Window:
    """What the engine takes at once."""

    sequences: int = 128
    tokens: int | None = None  # of the cache; None: not known
    slots: int = 4  # different adapters
    patience: float = 1.0  # seconds that a request may be passed over because its adapter has no slot
    answer: int = 64  # tokens expected of a tenant's first answers
    active: float = 1.0  # seconds after its last request for which a sequence is kept for a tenant


@dataclass(frozen=True, eq=False)
class Ask:
    """A request that wants to go to the engine."""

    tenant: str
    adapter: str | None  # the version's name; None for the base, which needs no slot
    since: float  # seconds, of the caller's clock
    prompt: int = 1  # tokens, about
    sequences: int = 1
    weight: float = 1.0  # of the tenant: with 2 it gets twice as much


@dataclass(eq=False)
class Grant:
    """A request in the engine: what was charged for it so far, and what it has really got."""

    ask: Ask
    expected: int  # tokens of the answer, as predicted; charged already
    served: int = 0  # tokens that came

    @property
    def left(self) -> int:
        """Tokens that are expected yet."""
        return max(0, self.expected - self.served)

    @property
    def tokens(self) -> int:
        """Of the cache, as predicted."""
        return self.ask.prompt + self.expected


class Counters:
    """What each tenant was served, in cost over weight."""

    def __init__(self) -> None:
        self._served: dict[str, float] = {}
        self._ahead: dict[str, float] = {}  # of that, charged for tokens that have not come yet
        self._last = 0.0  # of the tenant that went last from an empty line

    def of(self, tenant: str) -> float:
        return self._served.get(tenant, 0.0)

    def arrive(self, tenant: str, *, waiting: Iterable[str]) -> None:
        """A tenant that has nothing waiting asks again; ``waiting`` are the tenants that have.

        It starts at what one of them has really got: what was only predicted for it may never come.
        """
        floor = min((self._got(other) for other in waiting), default=self._last)
        self._served[tenant] = max(self.of(tenant), floor)

    def charge(self, tenant: str, cost: float, *, weight: float) -> None:
        self._served[tenant] = self.of(tenant) + cost / weight

    def predict(self, tenant: str, cost: float, *, weight: float) -> None:
        """So much of what was charged is still to come; less than nothing: it came, or is not going to."""
        self._ahead[tenant] = self._ahead.get(tenant, 0.0) + cost / weight

    def _got(self, tenant: str) -> float:
        return self.of(tenant) - self._ahead.get(tenant, 0.0)

    def left(self, tenant: str) -> None:
        """The last waiting request of a tenant went to the engine."""
        self._last = self._got(tenant)


class Line:
    """Requests that wait and requests in the engine. ``now`` is the caller's clock, in seconds; it never goes back."""

    def __init__(self, window: Window) -> None:
        self.window = window
        self.counters = Counters()
        self._lines: dict[str, dict[str | None, deque[Ask]]] = {}  # tenant → adapter → those that wait, oldest first
        self._running: dict[str, int] = {}  # tenant → sequences in the engine
        self._adapters: dict[str, int] = {}  # adapter that has a slot → requests under way
        self._slotted: dict[str, float] = {}  # adapter that has a slot → since when
        self._resting: dict[str, float] = {}  # tenant with neither → since when; longest first
        self._lengths: dict[str, float] = {}  # tenant → tokens of its answers, in the mean
        self._sequences = 0
        self._tokens = 0

    # ── coming and going ─────────────────────────────────────────────────────────────────────────────────────

    def is_free(self, ask: Ask, now: float) -> bool:
        """Whether a request would go at once: nobody waits, and there is room for it."""
        if self._lines or not self._has_slot(ask.adapter, set()):
            return False
        return not self._is_kept_for_others(ask, now) and self._fits(ask)

    def join(self, ask: Ask) -> None:
        self._resting.pop(ask.tenant, None)
        if ask.tenant not in self._lines:
            self.counters.arrive(ask.tenant, waiting=self._lines)
        self._lines.setdefault(ask.tenant, {}).setdefault(ask.adapter, deque()).append(ask)

    def leave(self, ask: Ask) -> None:
        """Its client went away before its turn."""
        self._take_out(ask)

    def next(self, now: float) -> Grant | None:
        """Send the next request to the engine; None where nobody may go now."""
        chosen = self._choose(now)
        return self._grant(chosen, now) if chosen else None

    def count(self, grant: Grant, *, output: int) -> None:
        """``output`` more tokens of the answer came; those beyond what was expected are charged now."""
        tenant, weight, before = grant.ask.tenant, grant.ask.weight, grant.left
        grant.served += output
        came = before - grant.left  # of what was expected
        self.counters.predict(tenant, -OUTPUT_COST * came, weight=weight)
        self.counters.charge(tenant, OUTPUT_COST * (output - came), weight=weight)

    def end(self, grant: Grant, now: float) -> None:
        """The answer is over: what it did not use is given back."""
        ask = grant.ask
        self.counters.predict(ask.tenant, -OUTPUT_COST * grant.left, weight=ask.weight)
        self.counters.charge(ask.tenant, -OUTPUT_COST * grant.left, weight=ask.weight)
        if grant.served:  # and not refused, or left by its client
            mean = self._lengths.get(ask.tenant, self.window.answer)
            self._lengths[ask.tenant] = MEMORY * mean + (1 - MEMORY) * grant.served / ask.sequences
        self._sequences -= self._width(ask)
        self._tokens -= grant.tokens
        _lessen(self._running, ask.tenant, self._width(ask))
        if ask.adapter is not None:
            _lessen(self._adapters, ask.adapter, 1)
            if ask.adapter not in self._adapters:
                del self._slotted[ask.adapter]
        if ask.tenant not in self._running and ask.tenant not in self._lines:
            self._resting[ask.tenant] = now

    # ── looking ──────────────────────────────────────────────────────────────────────────────────────────────

    @property
    def running(self) -> int:
        """Sequences in the engine."""
        return self._sequences

    def waiting(self, tenant: str) -> int:
        """Requests of a tenant that wait."""
        return sum(map(len, self._lines.get(tenant, {}).values()))

    @property
    def all_waiting(self) -> int:
        """Requests that wait, of all tenants."""
        return sum(map(self.waiting, self._lines))

    def next_change(self, now: float) -> float | None:
        """Seconds until a kept sequence is kept no longer; None where none is, or nobody waits."""
        if not self._lines or not self._expected_back(now):
            return None
        return max(0.0, next(iter(self._resting.values())) + self.window.active - now)

    # ── the rules ────────────────────────────────────────────────────────────────────────────────────────────

    def _choose(self, now: float) -> Ask | None:
        heads = [line[0] for lines in self._lines.values() for line in lines.values()]
        closed = self._closed(heads, now)
        may_go = [ask for ask in heads if self._has_slot(ask.adapter, closed)]
        may_go.sort(key=lambda ask: self._order(ask, now))
        for ask in may_go:
            if not self._is_kept_for_others(ask, now):
                return ask if self._fits(ask) else None
        return None

    def _order(self, ask: Ask, now: float) -> tuple[float, ...]:
        """Who waited too long for a slot first; of them, and of the others, who was served least.

        Of two with the same counter, the one with fewer sequences: who comes back starts at the least counter.
        """
        served = self.counters.of(ask.tenant), self._running.get(ask.tenant, 0), ask.since
        return (0, *served) if self._is_late(ask, now) else (1, *served)

    def _closed(self, heads: list[Ask], now: float) -> set[str]:
        """Adapters that get no new requests: one for each that waited too long for its slot.

        Of those that have had theirs for as long, so that all who wait for an adapter go together when it gets one; and
        of them those with the fewest requests under way. Their number only falls, so a slot is free after at most the
        longest of them.
        """
        late = {ask.adapter for ask in heads if self._is_late(ask, now)}
        free = self.window.slots - len(self._adapters)
        if len(late) <= free:
            return set()
        had = [adapter for adapter, since in self._slotted.items() if now - since >= self.window.patience]
        return set(sorted(had, key=self._adapters.__getitem__)[: len(late) - free])

    def _is_late(self, ask: Ask, now: float) -> bool:
        needs_slot = ask.adapter is not None and ask.adapter not in self._adapters
        return needs_slot and now - ask.since >= self.window.patience

    def _has_slot(self, adapter: str | None, closed: set[str]) -> bool:
        if adapter is None:
            return True
        return adapter not in closed if adapter in self._adapters else len(self._adapters) < self.window.slots

    def _is_kept_for_others(self, ask: Ask, now: float) -> bool:
        if ask.tenant not in self._running:
            return False
        left = self.window.sequences - self._sequences - self._width(ask)
        return left < min(self._expected_back(now), self.window.sequences // 2)

    def _expected_back(self, now: float) -> int:
        """How many tenants without a request asked a moment ago."""
        while self._resting and now - next(iter(self._resting.values())) >= self.window.active:
            del self._resting[next(iter(self._resting))]
        return len(self._resting)

    def _fits(self, ask: Ask) -> bool:
        if not self._sequences:
            return True  # whatever it needs: it gets the engine for itself
        room = self.window.tokens is None or self._tokens + ask.prompt + self._expected(ask) <= self.window.tokens
        return room and self._sequences + self._width(ask) <= self.window.sequences

    def _width(self, ask: Ask) -> int:
        return min(ask.sequences, self.window.sequences)

    def _expected(self, ask: Ask) -> int:
        return max(1, round(self._lengths.get(ask.tenant, self.window.answer) * ask.sequences))

    # ── carrying them out ────────────────────────────────────────────────────────────────────────────────────

    def _grant(self, ask: Ask, now: float) -> Grant:
        grant = Grant(ask, expected=self._expected(ask))
        cost = INPUT_COST * ask.prompt + OUTPUT_COST * grant.expected
        self.counters.charge(ask.tenant, cost, weight=ask.weight)
        self.counters.predict(ask.tenant, OUTPUT_COST * grant.expected, weight=ask.weight)
        self._take_out(ask)
        self._sequences += self._width(ask)
        self._tokens += grant.tokens
        self._running[ask.tenant] = self._running.get(ask.tenant, 0) + self._width(ask)
        if ask.adapter is not None:
            self._adapters[ask.adapter] = self._adapters.get(ask.adapter, 0) + 1
            self._slotted.setdefault(ask.adapter, now)
        return grant

    def _take_out(self, ask: Ask) -> None:
        lines = self._lines[ask.tenant]
        lines[ask.adapter].remove(ask)
        if not lines[ask.adapter]:
            del lines[ask.adapter]
        if not lines:
            del self._lines[ask.tenant]
            self.counters.left(ask.tenant)


def _lessen(counts: dict[str, int], key: str, by: int) -> None:
    counts[key] -= by
    if not counts[key]:
        del counts[key]
