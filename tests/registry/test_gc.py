"""Collecting garbage, in every store: what goes, what stays and why. That nothing is lost is test_gc_model's."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest

from adapterhub.errors import Gone, IntegrityError, NotFound, StorageError, Unsupported
from adapterhub.refs import AdapterName
from adapterhub.registry import Draft, ObjectRegistry, Registry, layout
from adapterhub.registry.fsck import fsck
from adapterhub.registry.lifecycle.gc import Patience, Report, collect
from adapterhub.registry.lifecycle.intents import Intents
from adapterhub.registry.memory import MemoryStore

Drafts = Callable[..., Draft]
AT_ONCE = Patience(young=-60, publish=-60, upload=-60, closed=-60)
WEIGHTS = "adapter_model.safetensors"


def pins(report: Report) -> dict[str, tuple[str, ...]]:
    return {blob.key: blob.pinned_by for blob in report.blobs}


def blobs(registry: ObjectRegistry) -> list[str]:
    return registry.store.keys(layout.blobs("acme"))


@pytest.fixture
def three(registry: ObjectRegistry, new_draft: Drafts, name: AdapterName) -> ObjectRegistry:
    """@1 and @2 share their config, @1 is deleted; @3 is the same as @2."""
    for text in ("one", "two", "two"):
        registry.publish(new_draft(text), name=name, author="ana")
    registry.set_status(name, 1, "deleted", who="ana")
    return registry


def test_what_only_a_deleted_version_has_goes(three: ObjectRegistry, name: AdapterName) -> None:
    before = blobs(three)
    dry = collect(three, dry_run=True, patience=AT_ONCE)
    assert (dry.freed, dry.freed_size) == (1, len(b"one"))
    assert sorted(pins(dry).values()) == [(), *2 * [("acme/support@3", "acme/support@2")]]
    assert blobs(three) == before
    done = collect(three, ["acme"], patience=AT_ONCE)
    assert (done.freed, done.freed_size) == (1, len(b"one"))
    assert len(blobs(three)) == len(before) - 1
    assert three.store.keys(layout.collections("acme")) == []
    assert fsck(three).is_clean
    assert three.version(name, 1).status == "deleted"
    assert collect(three, patience=AT_ONCE).freed == 0


def test_the_young_stay(three: ObjectRegistry) -> None:
    report = collect(three)
    assert report.freed == 0
    assert all(pin[-1] == "stored less than 24 hours ago" for pin in pins(report).values())


def test_a_publish_under_way_pins(three: ObjectRegistry, name: AdapterName) -> None:
    (garbage,) = [key for key, pin in pins(collect(three, dry_run=True, patience=AT_ONCE)).items() if not pin]
    intents = Intents(three.store)
    intent = intents.begin(name, [garbage], who="ben")
    waiting = Patience(young=-60)
    report = collect(three, patience=waiting)
    assert report.freed == 0
    assert pins(report)[garbage] == (f"a publish of acme/support by ben since {intent.when}",)
    assert collect(three, patience=AT_ONCE).freed == 1
    assert not intents.seal(intent)  # it was given up, and starts over
    assert not intents.seal(intent)


def test_a_publish_about_to_commit_is_waited_for_until_somebody_forgets_it(
    three: ObjectRegistry, name: AdapterName
) -> None:
    (garbage,) = [key for key, pin in pins(collect(three, dry_run=True, patience=AT_ONCE)).items() if not pin]
    intents = Intents(three.store)
    intent = intents.begin(name, [garbage], who="ben")
    assert intents.seal(intent)
    report = collect(three, patience=AT_ONCE)
    assert report.freed == 0
    assert f"ah gc --forget {intent.id}" in report.notes[0]
    with pytest.raises(NotFound):
        collect(three, patience=AT_ONCE, forget="nobody")
    assert collect(three, patience=AT_ONCE, forget=intent.id).freed == 1


@pytest.mark.parametrize("wanted", [None, 5])
def test_a_publish_that_was_killed_about_to_commit_is_over_when_its_number_is_taken(
    three: ObjectRegistry, new_draft: Drafts, name: AdapterName, wanted: int | None
) -> None:
    (garbage,) = [key for key, pin in pins(collect(three, dry_run=True, patience=AT_ONCE)).items() if not pin]
    intents = Intents(three.store)
    intent = intents.begin(name, [garbage], who="ben", number=wanted)
    assert intents.seal(intent)
    assert not intents.is_doubted(intent)
    for _ in range(2):
        report = collect(three, patience=AT_ONCE)
        assert (report.freed, intents.is_doubted(intent)) == (0, True)
        assert f"until {name} has its next version" in report.notes[0]
    for number in range(4, (wanted or 4) + 1):
        assert collect(three, patience=AT_ONCE).freed == 0
        three.publish(new_draft("two"), name=name, author="ana", number=number)
    assert pins(collect(three, dry_run=True, patience=AT_ONCE))[garbage] == ()
    assert collect(three, patience=AT_ONCE).freed == 1
    assert intents.is_doubted(intent)  # it may wake up and ask
    intents.end(intent)
    assert collect(three, patience=AT_ONCE).freed == 0
    assert three.store.keys(layout.intents("acme")) == []


def test_a_number_that_was_left_out_may_still_be_taken_by_a_sleeping_publisher(
    three: ObjectRegistry, new_draft: Drafts, name: AdapterName
) -> None:
    (garbage,) = [key for key, pin in pins(collect(three, dry_run=True, patience=AT_ONCE)).items() if not pin]
    intent = Intents(three.store).begin(name, [garbage], who="ben")
    assert Intents(three.store).seal(intent)
    collect(three, patience=AT_ONCE)
    three.publish(new_draft("two"), name=name, author="ana", number=9)  # a copy that keeps its number
    assert collect(three, patience=AT_ONCE).freed == 0


def test_a_publish_of_a_version_that_does_not_ask_for_doubts_is_waited_for(
    three: ObjectRegistry, new_draft: Drafts, name: AdapterName
) -> None:
    (garbage,) = [key for key, pin in pins(collect(three, dry_run=True, patience=AT_ONCE)).items() if not pin]
    intents = Intents(three.store)
    intent = intents.begin(name, [garbage], who="ben")
    assert intents.seal(intent)
    key = layout.intent("acme", intent.id)
    older = {k: v for k, v in json.loads(three.store.read(key)).items() if k != "number"}
    three.store.delete(key)
    three.store.create(key, json.dumps(older).encode())
    collect(three, patience=AT_ONCE)
    three.publish(new_draft("two"), name=name, author="ana")
    assert collect(three, patience=AT_ONCE).freed == 0


def test_what_happened_long_ago_goes_from_the_change_log(three: ObjectRegistry, name: AdapterName) -> None:
    log = layout.events("acme")
    assert len(three.store.keys(log)) == 4
    overview = three.overview("acme")
    assert collect(three, patience=AT_ONCE).hints == 0
    past = replace(AT_ONCE, hint=-60)
    assert collect(three, dry_run=True, patience=past).hints == 4
    assert len(three.store.keys(log)) == 4
    assert collect(three, patience=past).hints == 4
    assert three.store.keys(log) == []
    assert three.overview("acme") == overview


def test_a_publish_that_only_did_not_say_that_it_ended_pins_nothing(
    registry: ObjectRegistry, new_draft: Drafts, name: AdapterName, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(registry.store, "delete", lambda *keys: None)  # killed before its last step
        registry.publish(new_draft("one"), name=name, author="ana")
    assert registry.store.keys(layout.intents("acme"))
    registry.set_status(name, 1, "deleted", who="ana")
    assert collect(registry, patience=AT_ONCE).freed == 2
    assert registry.store.keys(layout.intents("acme")) == []


def test_bytes_that_are_being_collected_are_stored_beside(
    three: ObjectRegistry, new_draft: Drafts, name: AdapterName, monkeypatch: pytest.MonkeyPatch, tmp_path: Any
) -> None:
    with monkeypatch.context() as patch:  # a collector that was killed before it deleted anything
        patch.setattr(three.store, "delete", Killed.raised)
        with pytest.raises(Killed):
            collect(three, patience=AT_ONCE)
    record = three.publish(new_draft("one"), name=name, author="ana")
    (epoch,) = record.epochs.values()
    assert [key for key in blobs(three) if key.endswith(f"~{epoch}")]
    assert three.version(name, 4).record.epochs == record.epochs
    again = three.publish(new_draft("one"), name=name, author="ana")
    assert (again.epochs, again.digest) == (record.epochs, record.digest)
    assert collect(three, patience=AT_ONCE).freed == 1
    three.fetch_file(record, WEIGHTS, tmp_path / "file")
    assert (tmp_path / "file").read_text() == "one"
    assert fsck(three).is_clean


class Killed(BaseException):
    """What a process feels of its SIGKILL: nothing that it could catch."""

    @classmethod
    def raised(cls, *keys: str) -> None:
        raise cls


def test_a_publish_tells_when_its_bytes_vanish(
    new_draft: Drafts, name: AdapterName, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = MemoryStore()
    registry = ObjectRegistry(store)
    create = store.create

    def expire(key: str, value: bytes, *, lasting: bool = True) -> None:
        create(key, value, lasting=lasting)
        if "/v/" in key:
            store.delete(*store.keys(layout.blobs("acme")))

    monkeypatch.setattr(store, "create", expire)
    with pytest.raises(IntegrityError, match="gone already"):
        registry.publish(new_draft(), name=name, author="ana")


def test_what_cannot_be_read_stops_the_collection(three: ObjectRegistry, name: AdapterName) -> None:
    before = blobs(three)
    three.store.create(layout.intent("acme", "x"), b"{}")
    with pytest.raises(IntegrityError, match="intents/x"):
        collect(three, patience=AT_ONCE)
    three.store.delete(layout.intent("acme", "x"))
    three.store.create(layout.version(name, 4), b"{}")
    with pytest.raises(IntegrityError):
        collect(three, patience=AT_ONCE)
    assert blobs(three) == before


def test_a_tenant_that_is_not_there(three: ObjectRegistry) -> None:
    with pytest.raises(NotFound, match="beta"):
        collect(three, ["beta"])


def test_bytes_of_a_first_publish_that_was_killed_go(
    registry: ObjectRegistry, new_draft: Drafts, name: AdapterName, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(Intents, "seal", Killed.raised)
        with pytest.raises(Killed):
            registry.publish(new_draft(), name=name, author="ana")
    assert registry.tenants() == []
    assert collect(registry, patience=AT_ONCE).freed == 2


def test_the_hub_keeps_its_bytes_itself(hub_server: Any, request: pytest.FixtureRequest) -> None:
    from adapterhub.registry.hub.registry import HubRegistry

    hub = HubRegistry("acme-models", endpoint=hub_server.endpoint, token="hf_writer")
    report = collect(hub)
    assert (report.freed, report.unfinished) == (0, 0)
    assert "keeps the bytes" in report.notes[0]
    with pytest.raises(Unsupported, match="waits for no publish"):
        collect(hub, forget="a" * 32)
    with pytest.raises(NotFound, match="no tenant 'nobody'"):
        collect(hub, ["nobody"])


# ── tenants that were deleted ────────────────────────────────────────────────────────────────────────────────────


def test_of_a_deleted_tenant_only_its_tombstone_is_left(
    registry: ObjectRegistry, new_draft: Drafts, name: AdapterName
) -> None:
    registry.publish(new_draft(), name=name, author="ana")
    registry.set_channel(name, "prod", {1: 100}, who="ana")
    other = AdapterName("acme2", "bot")
    registry.publish(new_draft(), name=other, author="ana")
    registry.delete_tenant("acme", who="ana", why="left us")
    assert registry.store.keys("t/acme/") == []
    assert b"left us" in registry.store.read("gone/acme.json")
    assert registry.tenants() == ["acme2"]
    with pytest.raises(Gone, match="'acme' was deleted"):
        registry.publish(new_draft(), name=name, author="ben")
    with pytest.raises(NotFound):
        registry.versions(name)
    registry.delete_tenant("acme", who="ben")  # finishes what was broken off
    assert b"left us" in registry.store.read("gone/acme.json")
    assert fsck(registry).is_clean


def test_what_came_after_the_deletion_is_cleared(
    registry: ObjectRegistry, new_draft: Drafts, name: AdapterName
) -> None:
    registry.publish(new_draft(), name=name, author="ana")
    record = registry.store.read(layout.version(name, 1))
    registry.delete_tenant("acme", who="ana")
    registry.store.create(layout.version(name, 1), record)  # of a publisher that was killed right after
    assert registry.tenants() == []
    collect(registry)
    assert registry.store.keys("t/acme/") == []


def test_a_publisher_that_looked_before_the_deletion_clears_up(
    new_draft: Drafts, name: AdapterName, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = MemoryStore()
    registry = ObjectRegistry(store)
    registry.publish(new_draft(), name=name, author="ana")
    seal = Intents.seal

    def deleted_meanwhile(self: Intents, intent: Any) -> bool:
        ObjectRegistry(store).delete_tenant("acme", who="ana")
        return seal(self, intent)

    monkeypatch.setattr(Intents, "seal", deleted_meanwhile)
    with pytest.raises(Gone):
        registry.publish(new_draft(), name=name, author="ben")
    assert store.keys("t/acme/") == []


def test_a_tenant_that_never_was(every_registry: Registry) -> None:
    with pytest.raises(NotFound, match="nobody"):
        every_registry.delete_tenant("nobody", who="ana")


def test_a_store_that_goes_away_leaves_nothing_undecided(
    new_draft: Drafts, name: AdapterName, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = MemoryStore()
    registry = ObjectRegistry(store)
    create = store.create

    def away(key: str, value: bytes, *, lasting: bool = True) -> None:
        if "/v/" in key:
            raise StorageError("the store is away")
        create(key, value, lasting=lasting)

    with monkeypatch.context() as patch:
        patch.setattr(store, "create", away)
        with pytest.raises(StorageError):
            registry.publish(new_draft(), name=name, author="ana")
    report = collect(registry, patience=AT_ONCE)  # its record may still arrive
    assert (report.freed, len(report.notes)) == (0, 1)
