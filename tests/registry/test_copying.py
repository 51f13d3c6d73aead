"""Copies and mirrors: the same bytes and digests, nothing twice, nothing overwritten."""

from __future__ import annotations

import signal
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from adapterhub.errors import Conflict, Gone, NotFound, StorageError, Untrusted
from adapterhub.manifest import Lineage, Record
from adapterhub.refs import AdapterName, AdapterRef
from adapterhub.registry import Cache, Draft, ObjectRegistry, Registry
from adapterhub.registry.base import Status
from adapterhub.registry.fsck import fsck
from adapterhub.registry.local import LocalStore
from adapterhub.registry.memory import MemoryStore
from adapterhub.registry.moving.copying import Landed, land, original
from adapterhub.registry.moving.mirror import Report, mirror
from adapterhub.registry.signing import Signers, sign

Drafts = Callable[..., Draft]
WEIGHTS = "adapter_model.safetensors"


@pytest.fixture
def store() -> MemoryStore:
    """One kind is enough: `test_kinds` has the others."""
    return MemoryStore()


@pytest.fixture
def other(tmp_path: Path) -> ObjectRegistry:
    """The registry on the other side."""
    return ObjectRegistry(LocalStore(tmp_path / "other"))


@pytest.fixture
def cache(registry: Registry, tmp_path: Path) -> Cache:
    return Cache(tmp_path / "cache", registry)


@pytest.fixture
def record(registry: Registry, new_draft: Drafts, name: AdapterName) -> Record:
    draft = new_draft("one")
    lineage = Lineage(method="sft", parents=(f"sha256:{'a' * 64}",), metrics={"eval_loss": 0.5})
    draft = replace(draft, manifest=replace(draft.manifest, lineage=lineage))
    return registry.publish(draft, name=name, author="ana", labels={"team": "billing"})


def copied(registry: Registry, ref: str, target: Registry, cache: Cache, **options: object) -> Landed:
    version = registry.resolve(AdapterRef.parse(ref))
    return land(original(registry, version), cache.fetch, target, **options)  # type: ignore[arg-type]


# ── copy ─────────────────────────────────────────────────────────────────────────────────────────────────────────


def test_a_copy_is_the_same_but_for_its_number(
    registry: Registry,
    other: Registry,
    cache: Cache,
    record: Record,
    new_draft: Drafts,
    keys: dict[str, tuple[Path, Path]],
    tmp_path: Path,
) -> None:
    other.publish(new_draft(), name=record.name, author="ben")
    registry.add_evaluation(record.name, 1, suite="heldout", metrics={"score": 0.5}, details={"n": 3}, who="eve")
    sign(registry, record, key=keys["ana"][0])
    landed = copied(registry, "acme/support@1", other, cache)
    copy = landed.record
    assert (landed.is_new, str(copy.ref)) == (True, "acme/support@2")
    assert (copy.digest, copy.manifest) == (record.digest, record.manifest)
    assert (copy.author, copy.labels, copy.verdicts) == (record.author, record.labels, record.verdicts)
    (evaluation,) = other.evaluations(record.name, 2)
    assert (evaluation.suite, evaluation.metrics, evaluation.who) == ("heldout", {"score": 0.5}, "eve")
    Signers.read([keys["ana"][1]]).require(other, copy)
    other.fetch_file(copy, WEIGHTS, tmp_path / "file")
    assert (tmp_path / "file").read_text() == "one"


def test_a_copy_made_again_changes_nothing(registry: Registry, other: Registry, cache: Cache, record: Record) -> None:
    registry.add_evaluation(record.name, 1, suite="a", metrics={"score": 1}, who="eve")
    first = copied(registry, "acme/support@1", other, cache)
    registry.add_evaluation(record.name, 1, suite="a", metrics={"score": 1}, who="eve")  # run again, same result
    again = copied(registry, "acme/support@1", other, cache)
    assert (first.is_new, again.is_new, again.record.version) == (True, False, 1)
    assert (first.evaluations, again.evaluations) == (1, 1)
    assert len(other.evaluations(record.name, 1)) == 2
    assert copied(registry, "acme/support@1", other, cache) == Landed(again.record, is_new=False)


def test_what_is_there_is_not_fetched(registry: ObjectRegistry, other: Registry, cache: Cache, record: Record) -> None:
    copied(registry, "acme/support@1", other, cache)
    cache.forget(record)
    registry.store.delete(*registry.store.keys("t/acme/blobs/"))
    assert not copied(registry, "acme/support@1", other, cache).is_new


def test_a_copy_may_have_another_name(registry: Registry, other: Registry, cache: Cache, record: Record) -> None:
    landed = copied(registry, "acme/support", other, cache, name=AdapterName("beta", "bot"))
    assert str(landed.record.ref) == "beta/bot@1"
    assert landed.record.digest == record.digest


def test_a_copy_may_keep_its_number(
    registry: Registry, other: Registry, cache: Cache, record: Record, new_draft: Drafts
) -> None:
    registry.publish(new_draft("two"), name=record.name, author="ana")
    assert copied(registry, "acme/support@2", other, cache, number=2).record.version == 2
    assert not copied(registry, "acme/support@2", other, cache, number=2).is_new
    with pytest.raises(Conflict):  # 1 is below the newest there
        copied(registry, "acme/support@1", other, cache, number=1)
    registry.publish(new_draft("three"), name=record.name, author="ana")
    other.publish(new_draft("another"), name=record.name, author="ben")
    with pytest.raises(Conflict, match="another version"):
        copied(registry, "acme/support@3", other, cache, number=3)


def test_statuses_are_heeded(registry: Registry, other: Registry, cache: Cache, record: Record) -> None:
    registry.set_status(record.name, 1, "deprecated", who="ana", why="old")
    copied(registry, "acme/support@1", other, cache)
    assert (other.version(record.name, 1).status, other.version(record.name, 1).why) == ("deprecated", "old")
    other.set_status(record.name, 1, "yanked", who="ben")
    with pytest.raises(Gone):
        copied(registry, "acme/support@1", other, cache)
    registry.set_status(record.name, 1, "yanked", who="ana")
    with pytest.raises(Gone):
        copied(registry, "acme/support@1", other, cache)


def test_fields_of_a_newer_program_survive_a_copy(
    registry: ObjectRegistry, other: ObjectRegistry, cache: Cache, record: Record
) -> None:
    raw = record.manifest.to_json() | {"colour": "blue"}
    manifest = type(record.manifest).from_json(raw)
    newer = registry.publish(Draft(cache.fetch(record), manifest, record.verdicts), name=record.name, author="ana")
    landed = copied(registry, f"acme/support@{newer.version}", other, cache)
    assert landed.record.digest == newer.digest
    assert landed.record.manifest.to_json()["colour"] == "blue"


COPIER = """
import os, signal, sys
from pathlib import Path
from adapterhub.refs import AdapterRef
from adapterhub.registry import Cache, open_registry
from adapterhub.registry.moving.copying import land, original

source, target, cache, kill_at = open_registry(sys.argv[1]), open_registry(sys.argv[2]), sys.argv[3], int(sys.argv[4])
calls = 0

def step(event, args):
    # every file that is opened, linked, made or removed on the way is a point where the process can end
    global calls
    changes = {"open", "os.link", "os.mkdir", "os.remove", "os.rename"}
    if event in changes and str(args[0]).startswith((sys.argv[2], cache)):
        calls += 1
        if calls == kill_at:
            os.kill(os.getpid(), signal.SIGKILL)

version = source.resolve(AdapterRef.parse("acme/support@1"))
sys.addaudithook(step)
land(original(source, version), Cache(Path(cache), source).fetch, target)
print(calls)
"""


@pytest.mark.slow
def test_a_copier_killed_anywhere_leaves_nothing_or_all_and_is_finished(
    new_draft: Drafts, name: AdapterName, tmp_path: Path
) -> None:
    source = ObjectRegistry(LocalStore(tmp_path / "source"))
    source.publish(new_draft("weights " * 50_000), name=name, author="ana")
    source.add_evaluation(name, 1, suite="heldout", metrics={"score": 1}, who="eve")

    def copier(target: Path, cache: Path, kill_at: int) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-c", COPIER, tmp_path / "source", target, cache, str(kill_at)]
        return subprocess.run(command, stdout=subprocess.PIPE, text=True, timeout=60)

    total = int(copier(tmp_path / "whole", tmp_path / "c", 0).stdout)
    for kill_at in range(1, total, max(1, total // 5)):
        target, cache = tmp_path / f"target-{kill_at}", tmp_path / f"cache-{kill_at}"
        assert copier(target, cache, kill_at).returncode == -signal.SIGKILL
        assert fsck(ObjectRegistry(LocalStore(target))).is_clean
        assert copier(target, cache, 0).returncode == 0
        there = ObjectRegistry(LocalStore(target))
        assert there.numbers(name) == [1]
        assert len(there.evaluations(name, 1)) == 1
        assert fsck(there).is_clean


# ── mirror ───────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.fixture
def tenants(registry: Registry, new_draft: Drafts) -> Registry:
    """acme/support with versions of every status and a channel of two targets; acme/bot; beta/bot."""
    support = AdapterName("acme", "support")
    for number in range(1, 6):
        registry.publish(new_draft(f"support {number}"), name=support, author="ana", labels={"n": str(number)})
    statuses: dict[int, Status] = {1: "deleted", 2: "yanked", 3: "deprecated"}
    registry.set_channel(support, "prod", {3: 100}, who="ana")
    registry.set_channel(support, "prod", {4: 90, 5: 10}, who="ana", why="try 5")
    for number, status in statuses.items():
        registry.set_status(support, number, status, who="ana", why=f"was {status}")
    for text in ("acme/bot", "beta/bot"):
        registry.publish(new_draft(text), name=AdapterName.parse(text), author="ben")
    return registry


def seen(registry: Registry) -> dict[str, object]:
    """All of a registry that a mirror must have the same."""
    found: dict[str, object] = {}
    for tenant in registry.tenants():
        for name in registry.adapters(tenant):
            for v in registry.versions(name):
                if v.status != "deleted":
                    signed = [s.key for s in registry.signatures(v.record)]
                    measured = [e.suite for e in registry.evaluations(name, v.record.version)]
                    found[str(v.record.ref)] = (v.record.digest, v.record.labels, v.status, v.why, signed, measured)
            for channel, move in registry.channels(name).items():
                found[f"{name}@{channel}"] = move.targets
    return found


def test_a_mirror_has_the_same(tenants: Registry, other: Registry, cache: Cache) -> None:
    report = mirror(tenants, other, files=cache.fetch)
    assert seen(other) == seen(tenants)
    assert (report.versions, report.channels, report.refused) == (6, 1, [])
    assert report.notes == ["acme/support@1 was deleted before it could be mirrored"]
    move = other.channels(AdapterName("acme", "support"))["prod"]
    assert (move.who, move.why) == ("ana", "try 5")
    again = mirror(tenants, other, files=cache.fetch)
    assert (again.changed, again.refused) == (0, [])


def test_only_what_changed_is_brought(
    tenants: Registry, other: Registry, cache: Cache, new_draft: Drafts, keys: dict[str, tuple[Path, Path]]
) -> None:
    mirror(tenants, other, files=cache.fetch)
    support, bot = AdapterName("acme", "support"), AdapterName("acme", "bot")
    tenants.publish(new_draft("support 6"), name=support, author="ana")
    tenants.set_channel(support, "prod", {6: 100}, who="ana")
    tenants.rollback(support, "prod", who="ana", why="worse")
    tenants.set_status(support, 2, "active", who="ana")
    tenants.set_status(support, 4, "deleted", who="ana")
    tenants.add_evaluation(bot, 1, suite="heldout", metrics={"score": 1}, who="eve")
    sign(tenants, tenants.version(bot, 1).record, key=keys["ana"][0])
    fetched: list[str] = []

    def fetch(record: Record) -> Path:
        fetched.append(str(record.ref))
        return cache.fetch(record)

    report = mirror(tenants, other, files=fetch)
    assert fetched == ["acme/support@6"]
    assert (report.versions, report.statuses, report.evaluations, report.signatures) == (1, 2, 1, 1)
    assert seen(other) == seen(tenants)


def test_some_tenants_alone(tenants: Registry, other: Registry, cache: Cache) -> None:
    mirror(tenants, other, ["beta"], files=cache.fetch)
    assert other.tenants() == ["beta"]
    with pytest.raises(NotFound, match="nobody"):
        mirror(tenants, other, ["nobody"], files=cache.fetch)


def test_a_mirror_that_broke_off_is_finished(tenants: Registry, other: Registry, cache: Cache) -> None:
    left = 2

    def fetch(record: Record) -> Path:
        nonlocal left
        left -= 1
        if left < 0:
            raise StorageError("the network is gone")
        return cache.fetch(record)

    with pytest.raises(StorageError):
        mirror(tenants, other, files=fetch)
    mirror(tenants, other, files=cache.fetch)
    assert seen(other) == seen(tenants)


def refused(report: Report) -> str:
    (reason,) = report.refused
    assert reason.startswith("acme/support: ")
    return reason


def test_a_target_with_versions_of_its_own_is_refused(
    tenants: Registry, other: Registry, cache: Cache, new_draft: Drafts
) -> None:
    mirror(tenants, other, files=cache.fetch)
    other.publish(new_draft("published there"), name=AdapterName("acme", "support"), author="mallory")
    before = seen(other)
    assert "acme/support@6 is in the target alone" in refused(mirror(tenants, other, files=cache.fetch))
    tenants.publish(new_draft("support 6"), name=AdapterName("acme", "support"), author="ana")
    tenants.publish(new_draft("bot 2"), name=AdapterName("beta", "bot"), author="ana")
    assert "acme/support@6 is another version" in refused(mirror(tenants, other, files=cache.fetch))
    after = seen(other)
    assert after.pop("beta/bot@2")  # the others go on
    assert after == before


def test_a_target_whose_channel_was_moved_is_refused(tenants: Registry, other: Registry, cache: Cache) -> None:
    mirror(tenants, other, files=cache.fetch)
    support = AdapterName("acme", "support")
    other.set_channel(support, "prod", {5: 100}, who="mallory")
    assert "by mallory" in refused(mirror(tenants, other, files=cache.fetch))


def test_channels_of_the_targets_own_are_left_alone(tenants: Registry, other: Registry, cache: Cache) -> None:
    mirror(tenants, other, files=cache.fetch)
    support = AdapterName("acme", "support")
    other.set_channel(support, "site", {4: 100}, who="site")
    report = mirror(tenants, other, files=cache.fetch)
    assert (report.changed, report.refused) == (0, [])
    assert other.channels(support)["site"].main.version == 4


def test_a_channel_on_a_yanked_version_stays_where_it_was(
    tenants: Registry, other: Registry, cache: Cache, new_draft: Drafts
) -> None:
    mirror(tenants, other, files=cache.fetch)
    support = AdapterName("acme", "support")
    tenants.publish(new_draft("support 6"), name=support, author="ana")
    tenants.set_channel(support, "prod", {6: 100}, who="ana")
    tenants.set_status(support, 6, "yanked", who="ana", why="rude")
    report = mirror(tenants, other, files=cache.fetch)
    assert any("stays where it is" in note and "rude" in note for note in report.notes)
    assert other.channels(support)["prod"].main.version == 4


def test_what_was_deleted_in_the_target_stays_deleted(tenants: Registry, other: Registry, cache: Cache) -> None:
    mirror(tenants, other, files=cache.fetch)
    other.set_status(AdapterName("acme", "support"), 5, "deleted", who="site")
    report = mirror(tenants, other, files=cache.fetch)
    assert "acme/support@5 is deleted in the target, which is final" in report.notes


def test_a_mirror_may_ask_for_signatures(
    tenants: Registry, other: Registry, tmp_path: Path, keys: dict[str, tuple[Path, Path]]
) -> None:
    cache = Cache(tmp_path / "strict", tenants, signers=Signers.read([keys["ana"][1]]))
    with pytest.raises(Untrusted):
        mirror(tenants, other, files=cache.fetch)
    assert other.tenants() == []
