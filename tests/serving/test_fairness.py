"""The bounds of virtual token counters, and the window's three rules, on an engine of steps: one token a sequence."""

from __future__ import annotations

import random
from collections import defaultdict
from itertools import combinations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from adapterhub.serving.admission.fairness import INPUT_COST, OUTPUT_COST, Ask, Grant, Line, Window


class Steps:
    """An engine that gives each request in it one token a step; the number of a step is the time."""

    def __init__(self, window: Window, *, seed: int = 0) -> None:
        self.line = Line(window)
        self.now = 0.0
        self.random = random.Random(seed)
        self.left: dict[Grant, int] = {}  # tokens to come
        self.cost: dict[str, float] = defaultdict(float)  # really served, by tenant
        self.waited: dict[str, list[float]] = defaultdict(list)  # by tenant, of each that went
        self.lengths: dict[Ask, int] = {}

    def ask(
        self,
        tenant: str,
        *,
        adapter: str | None = None,
        length: int = 4,
        prompt: int = 1,
        n: int = 1,
        weight: float = 1,
    ) -> Ask:
        ask = Ask(tenant, adapter, self.now, prompt=prompt, sequences=n, weight=weight)
        self.lengths[ask] = length
        self.line.join(ask)
        return ask

    def admit(self) -> list[Grant]:
        admitted = []
        while grant := self.line.next(self.now):
            admitted.append(grant)
            self.left[grant] = self.lengths[grant.ask]
            self.cost[grant.ask.tenant] += INPUT_COST * grant.ask.prompt
            self.waited[grant.ask.tenant].append(self.now - grant.ask.since)
        return admitted

    def step(self) -> list[Grant]:
        """Returns what ended."""
        self.now += 1
        over = []
        for grant in list(self.left):
            self.line.count(grant, output=grant.ask.sequences)
            self.cost[grant.ask.tenant] += OUTPUT_COST * grant.ask.sequences
            self.left[grant] -= 1
            if not self.left[grant]:
                del self.left[grant]
                self.line.end(grant, self.now)
                over.append(grant)
        return over

    def tenants_running(self) -> list[str]:
        return sorted(grant.ask.tenant for grant in self.left)


LONGEST, LARGEST = 8, 4  # tokens of an answer and of a prompt


@settings(max_examples=25, deadline=None)
@given(
    seed=st.integers(0, 10**6),
    sequences=st.integers(1, 5),
    weights=st.lists(st.sampled_from([0.5, 1.0, 2.0]), min_size=2, max_size=4),
    late=st.integers(0, 150),
)
def test_backlogged_tenants_get_the_same_for_their_weight(
    seed: int, sequences: int, weights: list[float], late: int
) -> None:
    """OSDI'24, theorem 4.4: at most twice the cost of what the window holds apart, after any time.

    Each tenant has answers of a length of its own, so that a line without counters would favour the longest; the last
    tenant comes late, and gets no more for that.
    """
    engine = Steps(Window(sequences=sequences, answer=4), seed=seed)
    names = [f"t{i}" for i in range(len(weights))]
    weight_of = dict(zip(names, weights, strict=True))
    lengths = {name: engine.random.randint(1, LONGEST) for name in names}
    at_start: dict[str, float] = {}
    bound = 2 * sequences * (INPUT_COST * LARGEST + OUTPUT_COST * LONGEST) / min(weights)
    for step in range(400):
        backlogged = names if step >= late else names[:-1]
        for name in backlogged:
            while engine.line.waiting(name) <= sequences:  # never empty, also after a round
                prompt = engine.random.randint(1, LARGEST)
                engine.ask(name, length=lengths[name], prompt=prompt, weight=weight_of[name])
        if step == late:
            at_start = dict(engine.cost)
        engine.admit()
        engine.step()
        if step >= late:
            got = {n: (engine.cost[n] - at_start.get(n, 0)) / weight_of[n] for n in names}
            assert all(abs(got[f] - got[g]) <= bound for f, g in combinations(names, 2)), (step, got, bound)


@settings(max_examples=50, deadline=None)
@given(seed=st.integers(0, 10**6), sequences=st.integers(1, 6), slots=st.integers(1, 3))
def test_everything_is_answered_and_the_window_holds(seed: int, sequences: int, slots: int) -> None:
    engine = Steps(Window(sequences=sequences, slots=slots, tokens=60, patience=3, active=2), seed=seed)
    choose = engine.random
    asked = 0
    for _ in range(60):
        for _ in range(choose.randint(0, 3)):
            tenant = choose.choice("abcd")
            adapter = choose.choice([None, f"{tenant}/1", f"{tenant}/2"])
            ask = engine.ask(tenant, adapter=adapter, length=choose.randint(1, 6), prompt=choose.randint(1, 9))
            asked += 1
            if choose.random() < 0.1:
                engine.line.leave(ask)
                asked -= 1
        engine.admit()
        assert engine.line.running == sum(grant.ask.sequences for grant in engine.left) <= sequences
        assert len({g.ask.adapter for g in engine.left} - {None}) <= slots
        assert len(engine.left) == 1 or sum(grant.tokens for grant in engine.left) <= 60
        engine.step()
    for _ in range(5000):
        if not any(engine.line.waiting(t) for t in "abcd"):
            break
        engine.admit()
        engine.step()
    assert sum(map(len, engine.waited.values())) == asked
    assert all(engine.line.waiting(t) == 0 for t in "abcd")


def test_a_tenant_that_was_away_has_saved_up_nothing() -> None:
    engine = Steps(Window(sequences=2))
    for _ in range(100):
        engine.ask("noisy")
    for _ in range(40):
        engine.admit()
        engine.step()
    for _ in range(50):
        engine.ask("back")
    before = dict(engine.cost)
    for _ in range(40):
        engine.admit()
        engine.step()
    gained = {name: engine.cost[name] - before.get(name, 0) for name in ("noisy", "back")}
    assert abs(gained["noisy"] - gained["back"]) <= 4 * (1 + OUTPUT_COST * 4), gained


def test_crowds_share_alike_and_single_clients_beside_them_do_not_wait() -> None:
    """The shape of benchmarks/fairness.py: clients that ask again a step after their answer, sixteen sequences."""
    got, waits = crowd(Window(sequences=16, slots=10, active=2), steps=600)
    assert jain(got) > 0.99
    assert set(waits) == {0}


def test_with_fewer_slots_than_tenants_too() -> None:
    """Those in line for a slot go by what they were served, and not by how long they stand in a line of their own."""
    got, waits = crowd(Window(sequences=16, slots=4, active=2, patience=5), steps=3000)
    assert jain(got) > 0.97
    assert sorted(waits)[int(0.95 * len(waits))] <= 3 * 32, "three answers"


def crowd(window: Window, *, steps: int) -> tuple[list[float], list[float]]:
    """What each of five crowds got, after two rounds of answers, and how long each of five single clients waited."""
    clients = {**{f"busy{n}": 16 for n in range(4)}, "noisy": 64, **{f"small{n}": 1 for n in range(5)}}
    engine = Steps(window)
    everybody = [tenant for tenant, count in clients.items() for _ in range(count)]
    engine.random.shuffle(everybody)
    for tenant in everybody:
        engine.ask(tenant, adapter=tenant, prompt=60, length=32)
        engine.admit()  # who comes first has all of an idle engine
    at_start: dict[str, float] = {}
    for step in range(steps):
        if step == 64:
            at_start = dict(engine.cost)
            engine.waited.clear()
        over = engine.step()
        engine.admit()
        for grant in over:
            engine.ask(grant.ask.tenant, adapter=grant.ask.adapter, prompt=60, length=32)
        engine.admit()
    got = [engine.cost[tenant] - at_start.get(tenant, 0) for tenant, count in clients.items() if count > 1]
    waits = [wait for tenant, count in clients.items() if count == 1 for wait in engine.waited[tenant]]
    return got, waits


def jain(shares: list[float]) -> float:
    return sum(shares) ** 2 / (len(shares) * sum(share**2 for share in shares))


def test_who_comes_back_does_not_pay_for_what_was_only_predicted_for_others() -> None:
    """Sixteen answers of a word, for each of which 64 tokens were charged when it began."""
    engine = Steps(Window(sequences=16, slots=1, patience=0))
    for _ in range(40):
        engine.ask("busy", adapter="busy/a", prompt=1, length=1)
    engine.admit()
    engine.ask("light", adapter="light/a", prompt=1, length=1)
    engine.now += 1
    engine.step()
    assert engine.admit()[0].ask.tenant == "light"


class TestTheFreeSequence:
    @pytest.fixture
    def engine(self) -> Steps:
        """Sixteen sequences, a light tenant that just got its answer, and a noisy one with a long line."""
        engine = Steps(Window(sequences=16, active=5))
        engine.ask("light", length=1)
        for _ in range(64):
            engine.ask("noisy", length=50)
        engine.admit()
        assert engine.tenants_running() == ["light"] + ["noisy"] * 15
        engine.step()
        return engine

    def test_it_is_kept_for_who_asked_a_moment_ago(self, engine: Steps) -> None:
        assert engine.admit() == []
        engine.ask("light")
        assert [grant.ask.tenant for grant in engine.admit()] == ["light"]
        assert engine.waited["light"] == [0, 0]

    def test_only_for_a_moment(self, engine: Steps) -> None:
        assert engine.line.next_change(engine.now) == 5
        engine.now += 5
        assert [grant.ask.tenant for grant in engine.admit()] == ["noisy"]
        assert engine.line.next_change(engine.now) is None

    def test_never_against_a_tenant_that_has_none(self, engine: Steps) -> None:
        engine.ask("third")
        assert [grant.ask.tenant for grant in engine.admit()] == ["third"]

    def test_at_most_half_of_them(self) -> None:
        engine = Steps(Window(sequences=8, active=100))
        for number in range(20):
            engine.ask(f"light{number}", length=1)
        while engine.line.running or engine.admit():
            engine.step()
        for _ in range(20):
            engine.ask("noisy")
        engine.admit()
        assert engine.tenants_running() == ["noisy"] * 4


class TestSlots:
    def test_an_adapter_waits_its_patience_and_the_longest_request_and_no_longer(self) -> None:
        """One slot, and an adapter that always has requests: without the rule the other would never get it."""
        engine = Steps(Window(sequences=4, slots=1, patience=10), seed=1)
        for _ in range(4):
            engine.ask("busy", adapter="busy/a", length=engine.random.randint(5, 9))
        engine.admit()
        waiting = engine.ask("other", adapter="other/b", length=3)
        for _ in range(60):
            for _ in range(4 - engine.line.waiting("busy")):
                engine.ask("busy", adapter="busy/a", length=engine.random.randint(5, 9))
            engine.admit()
            engine.step()
        assert 10 <= engine.waited["other"][0] <= 10 + 10 + 9
        assert waiting not in engine.left
        assert len(engine.waited["busy"]) > 20, "before and after, the busy one goes on"

    def test_before_that_the_line_behind_it_goes_on(self) -> None:
        engine = Steps(Window(sequences=4, slots=1, patience=10))
        engine.ask("one", adapter="one/a")
        engine.ask("two", adapter="two/b")
        engine.ask("two")
        engine.ask("one", adapter="one/a")
        assert [grant.ask.adapter for grant in engine.admit()] == ["one/a", None, "one/a"]

    def test_all_who_wait_for_an_adapter_go_together_however_long_others_wait(self) -> None:
        """Closed at once, each would hold its slot for one request, and the engine would be all but empty."""
        engine = Steps(Window(sequences=99, slots=1, patience=10))
        for name in "abc":
            for _ in range(8):
                engine.ask(name, adapter=name, length=3)
        batches = []
        while engine.line.all_waiting:
            if batch := engine.admit():
                batches.append([grant.ask.adapter for grant in batch])
            engine.now += 20  # everybody is late
            engine.step()
        assert batches == [[name] * 8 for name in "abc"]

    def test_crowds_of_more_adapters_than_slots_fill_the_engine(self) -> None:
        """60 clients of 20 adapters on four slots: three for each, which is four at once if they go one by one."""
        engine = Steps(Window(sequences=99, slots=4, patience=10))
        for number in range(60):
            engine.ask("one", adapter=f"one/{number % 20}", length=16)
        served = 0
        for _ in range(400):
            engine.admit()
            served += len(engine.left)
            for _ in engine.step():
                engine.ask("one", adapter=f"one/{engine.random.randrange(20)}", length=16)
        assert served / 400 > 15
        assert max(engine.waited["one"]) <= 20 / 4 * (10 + 16)

    def test_only_as_many_adapters_are_closed_as_others_wait(self) -> None:
        engine = Steps(Window(sequences=9, slots=3, patience=5))
        for name, count in (("a", 3), ("b", 1), ("c", 2)):
            for _ in range(count):
                engine.ask(name, adapter=name, length=100)
        engine.admit()
        engine.ask("d", adapter="d")
        engine.now += 5
        for name in "abc":
            engine.ask(name, adapter=name, length=100)
        assert sorted(grant.ask.adapter or "" for grant in engine.admit()) == ["a", "c"]


def test_a_request_for_many_answers_is_not_passed_over_for_ever() -> None:
    engine = Steps(Window(sequences=4))
    for _ in range(4):
        engine.ask("small", length=engine.random.randint(1, 4))
    engine.admit()
    engine.ask("wide", n=4)
    for _ in range(30):
        engine.ask("small", length=engine.random.randint(1, 4))
        engine.admit()
        engine.step()
    assert engine.waited["wide"], "the others have been served more by then"


def test_more_answers_than_the_window_has_sequences_get_all_of_it() -> None:
    engine = Steps(Window(sequences=4))
    engine.ask("wide", n=100)
    engine.ask("small")
    engine.admit()
    assert engine.tenants_running() == ["wide"]


def test_a_short_answer_gives_back_what_was_expected_of_it() -> None:
    line = Line(Window())
    line.join(Ask("a", None, 0.0, prompt=10))
    grant = line.next(0.0)
    assert grant is not None
    assert line.counters.of("a") == 10 + OUTPUT_COST * grant.expected
    line.count(grant, output=3)
    line.end(grant, 1.0)
    assert line.counters.of("a") == 10 + OUTPUT_COST * 3


def test_a_long_answer_is_charged_as_it_comes() -> None:
    line = Line(Window())
    line.join(Ask("a", None, 0.0, prompt=10))
    grant = line.next(0.0)
    assert grant is not None
    for _ in range(grant.expected + 7):
        line.count(grant, output=1)
    assert line.counters.of("a") == 10 + OUTPUT_COST * (grant.expected + 7)
