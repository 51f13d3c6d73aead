"""Whatever is broken in a registry is found, named, and hides nothing else."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from adapterhub.errors import NotFound
from adapterhub.manifest import Record
from adapterhub.refs import AdapterName
from adapterhub.registry import Draft, ObjectRegistry
from adapterhub.registry.base import Signature
from adapterhub.registry.fsck import Report, fsck
from adapterhub.registry.memory import MemoryStore
from adapterhub.registry.signing import sign

Drafts = Callable[..., Draft]
V1, V2, V3 = (f"t/acme/a/support/v/{10**9 - n:09d}-{n}.json" for n in (1, 2, 3))


@pytest.fixture
def store() -> MemoryStore:
    """One kind is enough: `test_kinds` has the others."""
    return MemoryStore()


@pytest.fixture
def three(registry: ObjectRegistry, new_draft: Drafts, name: AdapterName) -> list[Record]:
    """Versions 1 to 3 with logs of every kind; 1 and 3 share their weights, 2 is yanked, prod points at 3."""
    records = [registry.publish(new_draft(text), name=name, author="ana") for text in ("same", "other", "same")]
    for number in (1, 2, 3):
        registry.set_channel(name, "prod", {number: 100}, who="ana")
        registry.add_evaluation(name, 3, suite="heldout", metrics={"score": 0.5}, who="ana")
    for status in ("deprecated", "active", "yanked"):
        registry.set_status(name, 2, status, who="ana")  # type: ignore[arg-type]
    return records


def found(report: Report) -> list[str]:
    assert all(problem.next for problem in report.problems)
    return [f"{problem.where}: {problem.what}" for problem in report.problems]


def blob(record: Record) -> str:
    sha256 = record.manifest.files[-1].sha256
    return f"t/acme/blobs/sha256/{sha256[:2]}/{sha256}"


def swap(registry: ObjectRegistry, key: str, value: bytes) -> None:
    registry.store.delete(key)
    registry.store.create(key, value)


def test_a_sound_registry_is_clean(registry: ObjectRegistry, three: list[Record], new_draft: Drafts) -> None:
    registry.publish(new_draft(), name=AdapterName("beta", "bot"), author="ben")
    told: list[int] = []
    report = fsck(registry, progress=told.append)
    assert report.is_clean
    assert (report.adapters, report.versions) == (2, 4)
    assert report.files == 3 + 2  # each blob of a tenant once
    assert report.size == sum(told)


def test_one_adapter_is_checked_alone(registry: ObjectRegistry, three: list[Record], new_draft: Drafts) -> None:
    other = registry.publish(new_draft(), name=AdapterName("acme", "bot"), author="ben")
    registry.store.delete(blob(other))
    assert fsck(registry, [three[0].name]).is_clean
    assert not fsck(registry, [other.name]).is_clean
    assert not fsck(registry).is_clean
    with pytest.raises(NotFound):
        fsck(registry, [AdapterName("acme", "nothing")])


def test_an_empty_registry_is_clean(registry: ObjectRegistry) -> None:
    assert fsck(registry) == Report()


def test_a_wrong_byte_is_found_in_every_version_that_has_it(registry: ObjectRegistry, three: list[Record]) -> None:
    swap(registry, blob(three[0]), b"samE")
    places = [line.partition(":")[0] for line in found(fsck(registry))]
    assert places == ["acme/support@1 adapter_model.safetensors", "acme/support@3 adapter_model.safetensors"]


def test_a_lost_blob_is_found_also_of_a_yanked_version(registry: ObjectRegistry, three: list[Record]) -> None:
    registry.store.delete(blob(three[1]))
    (line,) = found(fsck(registry))
    assert line.startswith("acme/support@2 adapter_model.safetensors")


def test_a_deleted_version_needs_no_bytes(registry: ObjectRegistry, three: list[Record]) -> None:
    registry.set_status(three[1].name, 2, "deleted", who="ana")
    registry.store.delete(blob(three[1]))
    assert fsck(registry).is_clean


@pytest.mark.parametrize(
    ("value", "said"),
    [
        (b"", "cannot be read"),
        (b"[" * 100_000, "cannot be read"),
        (b'{"format": 9}', "newer"),
        (b" " * 5_000_000, "too large"),
    ],
    ids=["empty", "deep", "newer", "large"],
)
def test_a_broken_record_hides_nothing_else(
    registry: ObjectRegistry, three: list[Record], value: bytes, said: str
) -> None:
    swap(registry, V2, value)
    registry.store.delete(blob(three[0]))
    lines = found(fsck(registry))
    assert [line.partition(":")[0] for line in lines] == [
        "acme/support@1 adapter_model.safetensors",
        "acme/support@2",
        "acme/support@3 adapter_model.safetensors",
    ]
    assert said in lines[1]


def test_a_record_with_another_manifest_is_found(registry: ObjectRegistry, three: list[Record]) -> None:
    swap(registry, V3, registry.store.read(V3).replace(b'"rank":4', b'"rank":5'))
    lines = found(fsck(registry))
    assert any("does not match its digest" in line for line in lines)
    assert any("points at version 3, which is not there or cannot be read" in line for line in lines)


def test_a_lost_record_leaves_a_dangling_channel(registry: ObjectRegistry, three: list[Record]) -> None:
    registry.store.delete(V3)
    assert found(fsck(registry)) == [
        "acme/support channel prod: it points at version 3, which is not there or cannot be read"
    ]


def test_a_channel_on_a_deleted_version_is_told(registry: ObjectRegistry, three: list[Record]) -> None:
    registry.set_status(three[2].name, 3, "deleted", who="ana")
    assert found(fsck(registry)) == ["acme/support channel prod: it points at version 3, which is deleted"]


@pytest.mark.parametrize(
    ("log", "where"),
    [("ch/prod/", "channel prod"), ("st/2/", "status"), ("ev/3/", "evaluations")],
    ids=["channel", "status", "evaluations"],
)
def test_logs_are_whole_and_readable(registry: ObjectRegistry, three: list[Record], log: str, where: str) -> None:
    newest, middle, _ = registry.store.keys(f"t/acme/a/support/{log}")
    kept = registry.store.read(middle)
    registry.store.delete(middle)
    assert any(where in line and "entries [1, 3]" in line for line in found(fsck(registry)))
    registry.store.create(middle, b"{")
    assert any(where in line and "cannot be read" in line for line in found(fsck(registry)))
    swap(registry, middle, kept)
    assert fsck(registry).is_clean
    swap(registry, newest, b"{")
    assert any("cannot be read" in line for line in found(fsck(registry)))


def test_a_version_that_its_digest_does_not_find_is_told(registry: ObjectRegistry, three: list[Record]) -> None:
    for number in (1, 3):
        registry.store.delete(f"t/acme/a/support/d/{three[0].digest.removeprefix('sha256:')}/{number}")
    (line,) = found(fsck(registry))
    assert line.startswith("acme/support@1 digest: ") or line.startswith("acme/support@3 digest: ")


@pytest.mark.parametrize("file", ["notes.txt", "0-first.txt"])
def test_what_is_no_key_of_ours_is_told(registry: ObjectRegistry, three: list[Record], file: str) -> None:
    registry.store.create(f"t/acme/a/support/v/{file}", b"put there by hand")
    assert any(f"{file} is no part of a registry" in line for line in found(fsck(registry)))


def test_signatures_are_whole_and_of_what_they_stand_beside(
    registry: ObjectRegistry, new_draft: Callable[..., Draft], name: AdapterName, keys: dict[str, tuple[Path, Path]]
) -> None:
    one, two = (registry.publish(new_draft(), name=name, author="ana") for _ in range(2))
    good = sign(registry, one, key=keys["ana"][0])
    assert fsck(registry).is_clean
    for wrong, said in (
        (Signature("0" * 64, good.bundle), "names another key"),
        (Signature(good.key, good.bundle), "another digest"),
        (Signature("1" * 64, b"{}"), "damaged"),
        (Signature("2" * 64, b"[" * 100_000), "damaged"),
    ):
        registry.add_signature(two, wrong)
        (problem,) = fsck(registry).problems
        assert problem.where == f"acme/support@2 signature {wrong.key[:12]}"
        assert said in problem.what
        registry.store.delete(*registry.store.keys("t/acme/a/support/sig/" + two.digest.removeprefix("sha256:") + "/"))
