"""Overviews by snapshot: always what a full look tells, in a few requests."""

from __future__ import annotations

import json
import random
import zlib
from collections.abc import Callable
from typing import Any

import pytest

from adapterhub.cli.main import main
from adapterhub.errors import IntegrityError, NotFound, StorageError, Unsupported
from adapterhub.manifest import canonical_json
from adapterhub.refs import AdapterName
from adapterhub.registry import Draft, ObjectRegistry, listing, memory, snapshots
from adapterhub.registry.memory import MemoryStore

Drafts = Callable[..., Draft]
HOUR = 3600.0
NAMES = [AdapterName("acme", f"a{n:03d}") for n in range(70)]


class Clock:
    """The machine's, moved by hand."""

    def __init__(self) -> None:
        self.now = 1_800_000_000.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr("adapterhub.registry.listing.time.time", clock)
    return clock


@pytest.fixture
def store(counting_store: Any) -> Any:
    return counting_store


@pytest.fixture
def registry(store: Any, clock: Clock, new_draft: Drafts) -> ObjectRegistry:
    """Seventy adapters with two versions and a channel, published an hour ago, and no snapshot yet."""
    registry, draft = ObjectRegistry(store), new_draft("same")
    for name in NAMES:
        for _ in range(2):
            registry.publish(draft, name=name, author="ana")
        registry.set_channel(name, "prod", {1: 100}, who="ana")
    clock.now += HOUR
    return registry


def plain(store: Any) -> list[Any]:
    """What a look at everything tells."""
    return [s.overview for _, s in sorted(listing.Listing(store)._scan("acme", {}, 0, []).adapters.items())]


def kept(store: Any) -> list[str]:
    return MemoryStore.keys(store, "t/acme/idx/")


def test_a_list_is_four_requests_where_a_snapshot_is(store: Any, registry: ObjectRegistry) -> None:
    first = registry.overview("acme")
    assert len(first) == 70 and len(kept(store)) == 1
    found: list[Any] = []
    asked = store.since(lambda: found.extend(ObjectRegistry(store).overview("acme")))
    assert [request.split("/")[0] for request in asked] == ["GET registry.json", "LIST t", "GET t", "LIST t"]
    assert found == first == plain(store)
    assert len(kept(store)) == 1  # nothing was read anew: nothing to keep


def test_all_tenants_are_told_from_their_snapshots(
    store: Any, registry: ObjectRegistry, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """`ah ls`, however many adapters."""
    registry.overview("acme")
    monkeypatch.setitem(memory._STORES, "counted", store)
    monkeypatch.setattr("sys.argv", ["ah", "ls", "--registry", "memory://counted", "--json"])
    with pytest.raises(SystemExit):
        store.since(main)
    asked = [request for request in store.asked if not request.startswith("GET registry.json")]
    assert len(asked) == 2 + 2 + 3  # tenants and tombstones; whether acme has an adapter; its snapshot
    assert json.loads(capsys.readouterr().out) == [{"tenant": "acme", "adapters": 70}]


def test_only_what_happened_since_is_read(store: Any, registry: ObjectRegistry, new_draft: Drafts) -> None:
    registry.overview("acme")
    registry.publish(new_draft("new"), name=NAMES[3], author="ana")
    registry.set_status(NAMES[4], 1, "yanked", who="ana")
    registry.set_channel(NAMES[5], "prod", {2: 100}, who="ana")
    registry.add_evaluation(NAMES[6], 2, suite="heldout", metrics={"score": 0.5}, who="ana")
    registry.publish(new_draft("new"), name=AdapterName("acme", "another"), author="ana")
    found: list[Any] = []
    asked = store.since(lambda: found.extend(registry.overview("acme")))
    assert found == plain(store)
    # a LIST of each adapter that was named; two records, a status, a move, an evaluation
    assert len(asked) == 3 + 5 + 5


def test_a_commit_that_follows_its_hint_late_is_told(
    store: Any, registry: ObjectRegistry, new_draft: Drafts, monkeypatch: pytest.MonkeyPatch, clock: Clock
) -> None:
    """Somebody lists, and writes a snapshot, between the hint and the record."""
    create, name = store.create, AdapterName("acme", "late")

    def looked_at(key: str, value: bytes, **options: Any) -> None:
        if key.startswith("t/acme/a/late/v/"):
            monkeypatch.setattr(store, "create", create)
            assert len(registry.overview("acme")) == 70
            assert len(kept(store)) == 1
            clock.now += 60
        create(key, value, **options)

    monkeypatch.setattr(store, "create", looked_at)
    registry.publish(new_draft("new"), name=name, author="ana")
    assert [o.name for o in registry.overview("acme")] == [*NAMES, name]


def test_a_writer_whose_clock_is_behind_is_told(
    store: Any, registry: ObjectRegistry, new_draft: Drafts, clock: Clock
) -> None:
    registry.overview("acme")
    clock.now -= 25 * 60
    registry.publish(new_draft("new"), name=NAMES[0], author="ana")
    clock.now += 26 * 60
    assert registry.overview("acme")[0].versions[0].version == 3


def test_what_no_hint_tells_is_told_the_next_day(
    store: Any, registry: ObjectRegistry, new_draft: Drafts, clock: Clock
) -> None:
    registry.overview("acme")
    registry.publish(new_draft("new"), name=NAMES[0], author="ana")
    store.delete(*store.keys("t/acme/log/"))
    assert registry.overview("acme")[0].versions[0].version == 2
    clock.now += 25 * HOUR
    assert registry.overview("acme")[0].versions[0].version == 3
    assert len(kept(store)) == 2  # the next one need not look at everything again


def test_three_snapshots_are_kept(store: Any, registry: ObjectRegistry, clock: Clock) -> None:
    for _ in range(5):
        registry.overview("acme")
        clock.now += 25 * HOUR
    assert len(kept(store)) == 3
    assert registry.reindex("acme") == 70
    assert len(kept(store)) == 3


def test_no_snapshot_brings_back_a_deleted_tenant(
    store: Any, registry: ObjectRegistry, monkeypatch: pytest.MonkeyPatch
) -> None:
    create = store.create

    def deleted_meanwhile(key: str, value: bytes, **options: Any) -> None:
        monkeypatch.setattr(store, "create", create)
        registry.delete_tenant("acme", who="ana")
        create(key, value, **options)

    monkeypatch.setattr(store, "create", deleted_meanwhile)
    registry.overview("acme")
    assert store.keys("t/acme/") == []
    assert registry.overview("acme") == []


def test_a_reader_who_may_not_write_lists_all_the_same(store: Any, registry: ObjectRegistry, clock: Clock) -> None:
    def refused(*_: Any, **__: Any) -> None:
        raise StorageError("no permission")

    store.create = store.delete = refused
    assert registry.overview("acme") == plain(store)
    with pytest.raises(StorageError):
        registry.reindex("acme")


@pytest.mark.parametrize("damage", ["empty", "cut", "bit", "newer", "text", "status", "huge"])
def test_a_damaged_snapshot_is_passed_over(
    store: Any, registry: ObjectRegistry, damage: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    good = registry.overview("acme")
    (key,) = kept(store)
    data = store.read(key)
    text = zlib.decompress(data, wbits=31)
    store.delete(key)
    damaged = {
        "empty": b"",
        "cut": data[:-9],
        "bit": data[:50] + bytes([data[50] ^ 1]) + data[51:],
        "newer": zlib.compress(text.replace(b'"format":1', b'"format":2'), wbits=31),
        "text": zlib.compress(canonical_json(["nothing"]), wbits=31),
        "status": zlib.compress(text.replace(b'"active"', b'"lovely"', 1), wbits=31),
        "huge": data,
    }[damage]
    if damage == "huge":
        monkeypatch.setattr(snapshots, "_LARGEST", len(text) - 1)
    store.create(key, damaged)
    with pytest.raises((IntegrityError, Unsupported)):
        snapshots.from_bytes(damaged, tenant="acme", key=key)
    assert registry.overview("acme") == good


def test_a_snapshot_is_read_as_it_was_written(store: Any, registry: ObjectRegistry) -> None:
    registry.set_status(NAMES[0], 1, "deprecated", who="ana")
    registry.add_evaluation(NAMES[0], 1, suite="heldout", metrics={"score": 0.5}, who="ana")
    whole = listing.Listing(store)._scan("acme", {}, 12.5, ["t/acme/log/x"])
    assert snapshots.from_bytes(snapshots.to_bytes(whole), tenant="acme", key="k") == whole


@pytest.mark.parametrize("seed", range(8))
def test_whatever_happens_a_list_tells_what_a_full_look_tells(
    seed: int, store: Any, clock: Clock, new_draft: Drafts, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(listing, "_WORTH", 2)  # snapshots all the time
    registry, chance, draft = ObjectRegistry(store), random.Random(seed), new_draft("same")
    for _ in range(60):
        name = NAMES[chance.randrange(12)]
        versions = registry.numbers(name) if registry.adapters("acme") and name in registry.adapters("acme") else []
        clock.now += chance.choice([0, 1, 30, 400, 4000, 90_000])
        act = chance.randrange(6)
        if act < 2 or not versions:
            registry.publish(draft, name=name, author="ana")
        elif act == 2:
            status: Any = chance.choice(["yanked", "active", "deprecated"])
            registry.set_status(name, chance.choice(versions), status, who="ana")
        elif act == 3:
            usable = [n for n in versions if registry.version(name, n).status != "yanked"]
            if usable:
                registry.set_channel(name, chance.choice(["prod", "canary"]), {chance.choice(usable): 100}, who="ana")
        elif act == 4:
            metrics = {"score": chance.random()}
            registry.add_evaluation(name, chance.choice(versions), suite="heldout", metrics=metrics, who="ana")
        if chance.random() < 0.5:
            assert registry.overview("acme") == plain(store)
    assert registry.overview("acme") == plain(store)


def test_names_that_begin_alike_are_kept_apart(store: Any, clock: Clock, new_draft: Drafts) -> None:
    registry = ObjectRegistry(store)
    alike = [AdapterName("acme", adapter) for adapter in ("bot", "bot-2", "bot.x", "bot2", "bot_a", "bo")]
    for name in alike:
        registry.publish(new_draft(), name=name, author="ana")
    assert [o.name for o in registry.overview("acme")] == sorted(alike)
    assert [len(o.versions) for o in registry.overview("acme")] == [1] * 6


def test_a_tenant_without_a_version_is_empty(store: Any, registry: ObjectRegistry) -> None:
    store.create("t/beta/a/killed/d/abc/1", b"")
    store.create("t/beta/a/Junk/v/999999998-1.json", b"")
    assert registry.overview("beta") == []
    assert registry.overview("nobody") == []
    with pytest.raises(NotFound):
        registry.versions(AdapterName("beta", "killed"))
