"""How a registry over a store is laid out there: blobs that are shared, hints, what somebody put there by hand."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from adapterhub.errors import IntegrityError, NotFound
from adapterhub.refs import AdapterName, AdapterRef
from adapterhub.registry import Draft, Event, ObjectRegistry, layout

Drafts = Callable[..., Draft]


def publish(registry: ObjectRegistry, draft: Draft, name: AdapterName) -> int:
    return registry.publish(draft, name=name, author="ana").version


def resolved(registry: ObjectRegistry, text: str) -> int:
    return registry.resolve(AdapterRef.parse(text)).record.version


def test_the_same_content_twice_is_two_versions_of_one_digest(
    registry: ObjectRegistry, new_draft: Drafts, name: AdapterName
) -> None:
    first = registry.publish(new_draft("same"), name=name, author="ana")
    blobs = registry.store.keys("t/acme/blobs/")
    second = registry.publish(new_draft("same"), name=name, author="ana")
    assert (first.digest, first.version, second.version) == (second.digest, 1, 2)
    assert registry.store.keys("t/acme/blobs/") == blobs


def test_recent_events_are_told_again_and_old_ones_are_not(
    registry: ObjectRegistry, new_draft: Drafts, name: AdapterName, monkeypatch: pytest.MonkeyPatch
) -> None:
    now = 1_800_000_000.0
    monkeypatch.setattr("adapterhub.registry.objects.time.time", lambda: now)
    start = registry.changes("acme").cursor
    publish(registry, new_draft(), name)
    first = registry.changes("acme", start)
    assert len(first.events) == 1
    now += 2
    again = registry.changes("acme", first.cursor)
    assert again.events == first.events  # the commit may have come after the look
    now += 60
    later = registry.changes("acme", again.cursor)
    assert registry.changes("acme", later.cursor).events == ()
    now -= 120  # a clock that steps back loses nothing that is yet to come
    back = registry.changes("acme", later.cursor)
    now += 180
    publish(registry, new_draft(), name)
    assert len(registry.changes("acme", back.cursor).events) == 1


@pytest.mark.parametrize("adapter", ["support", "a-b_c.d", "x" * 63])
@pytest.mark.parametrize("what", ["publish", "channel prod", "channel a-b", "status 3"])
def test_an_event_is_told_by_its_key(adapter: str, what: str) -> None:
    name = AdapterName("acme", adapter)
    key = layout.event(name, 1_800_000_000_123, "0" * 32, what)
    assert layout.event_of("acme", key) == (name, what, 1_800_000_000_123)
    assert len(key.rpartition("/")[2]) < 255  # also a file's name


def test_what_somebody_put_into_the_change_log_is_passed_over(
    registry: ObjectRegistry, new_draft: Drafts, name: AdapterName
) -> None:
    start = registry.changes("acme").cursor
    for junk in ("1.json", "0" * 13 + "-x.json", "0" * 13 + "-" + "0" * 32 + "--Bad--publish.json"):
        registry.store.create("t/acme/log/" + junk, b"")
    publish(registry, new_draft(), name)
    assert [event.what for event in registry.changes("acme", start).events] == ["publish"]


@pytest.mark.parametrize(
    ("what", "concerned"),
    [
        ("publish", ["@latest", "@sha256:" + "a" * 64]),
        ("channel prod", ["@prod"]),
        ("status 1", ["@latest", "@prod", "@1", "@sha256:" + "a" * 64]),
        ("evaluation 1", []),
        ("something newer", ["@latest", "@prod", "@1", "@sha256:" + "a" * 64]),
    ],
)
def test_an_event_concerns_what_may_resolve_otherwise(name: AdapterName, what: str, concerned: list[str]) -> None:
    event = Event("key", name, what, "")
    asked = ["@latest", "@prod", "@1", "@sha256:" + "a" * 64]
    assert [s for s in asked if event.concerns(AdapterRef.parse(f"{name}{s}"))] == concerned
    assert not event.concerns(AdapterRef.parse("acme/other@prod"))


def test_wrong_bytes_are_an_error_and_leave_no_file(
    registry: ObjectRegistry, new_draft: Drafts, name: AdapterName, tmp_path: Path
) -> None:
    record = registry.publish(new_draft("weights"), name=name, author="ana")
    entry = next(f for f in record.manifest.files if f.path == "adapter_model.safetensors")
    key = f"t/acme/blobs/sha256/{entry.sha256[:2]}/{entry.sha256}"
    for wrong in (b"weightx", b"weight", b"weights and more", b""):
        registry.store.delete(key)
        registry.store.create(key, wrong)
        with pytest.raises(IntegrityError, match="not what was published"):
            registry.fetch_file(record, entry.path, tmp_path / "file")
        assert not (tmp_path / "file").exists()
    registry.store.delete(key)
    with pytest.raises(NotFound):
        registry.fetch_file(record, entry.path, tmp_path / "file")


def test_a_damaged_blob_is_not_published_again_until_it_is_mended(
    registry: ObjectRegistry, new_draft: Drafts, name: AdapterName, tmp_path: Path
) -> None:
    record = registry.publish(new_draft("weights"), name=name, author="ana")
    entry = next(f for f in record.manifest.files if f.path == "adapter_model.safetensors")
    key = f"t/acme/blobs/sha256/{entry.sha256[:2]}/{entry.sha256}"
    registry.store.delete(key)
    registry.store.create(key, b"weightx")
    with pytest.raises(IntegrityError, match="damaged"):
        registry.publish(new_draft("weights"), name=name, author="ana")
    assert [v.record.version for v in registry.versions(name)] == [1]

    registry.store.delete(key)  # what the error tells to do
    again = registry.publish(new_draft("weights"), name=name, author="ana")
    for version, mended in enumerate((record, again), start=1):
        registry.fetch_file(mended, entry.path, tmp_path / str(version))
        assert (tmp_path / str(version)).read_bytes() == b"weights"


def test_a_file_is_checked_where_it_lies(registry: ObjectRegistry, new_draft: Drafts, name: AdapterName) -> None:
    record = registry.publish(new_draft("weights"), name=name, author="ana")
    path = "adapter_model.safetensors"
    registry.check_file(record, path)
    entry = next(f for f in record.manifest.files if f.path == path)
    key = f"t/acme/blobs/sha256/{entry.sha256[:2]}/{entry.sha256}"
    for wrong in (b"weightx", b"weight", b"weights and more", b""):
        registry.store.delete(key)
        registry.store.create(key, wrong)
        with pytest.raises(IntegrityError, match="not what was published"):
            registry.check_file(record, path)
    registry.store.delete(key)
    with pytest.raises(NotFound):
        registry.check_file(record, path)


# ── records that somebody tampered with ──────────────────────────────────────────────────────────────────────────


def test_a_record_of_another_name_or_number_is_not_believed(
    registry: ObjectRegistry, new_draft: Drafts, name: AdapterName
) -> None:
    publish(registry, new_draft(), name)
    record = registry.store.read("t/acme/a/support/v/999999999-1.json")
    registry.store.create("t/acme/a/support/v/999999998-2.json", record)
    with pytest.raises(IntegrityError):
        registry.resolve(name.at(2))
    registry.store.create("t/beta/a/support/v/999999999-1.json", record)
    with pytest.raises(IntegrityError):
        registry.resolve(AdapterRef.parse("beta/support@1"))


def test_foreign_files_are_named_not_guessed_at(registry: ObjectRegistry, new_draft: Drafts, name: AdapterName) -> None:
    publish(registry, new_draft(), name)
    registry.store.create("t/acme/a/support/v/000-notes.txt", b"")
    with pytest.raises(IntegrityError, match="by hand"):
        resolved(registry, "acme/support")


@pytest.mark.parametrize("value", [b"", b"[]", b"{}", b'{"format": 1}', b'{"format": 1, "targets": []}'])
def test_broken_log_entries_are_errors(
    registry: ObjectRegistry, new_draft: Drafts, name: AdapterName, value: bytes
) -> None:
    publish(registry, new_draft(), name)
    registry.store.create("t/acme/a/support/ch/prod/999999999-1.json", value)
    with pytest.raises(IntegrityError):
        resolved(registry, "acme/support@prod")
    registry.store.create("t/acme/a/support/st/1/999999999-1.json", value)
    with pytest.raises(IntegrityError):
        resolved(registry, "acme/support@1")


def test_a_registry_of_a_newer_format_is_refused(registry: ObjectRegistry) -> None:
    registry.store.delete("registry.json")
    registry.store.create("registry.json", b'{"format": 2, "id": "x"}')
    with pytest.raises(Exception, match="format 2"):
        registry.tenants()
