from __future__ import annotations

import shutil
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from adapterhub.errors import AlreadyExists, IntegrityError, NotFound, StorageError
from adapterhub.manifest import Record
from adapterhub.refs import AdapterName
from adapterhub.registry import Cache, Draft, ObjectRegistry, fetch_folder

CONTENT = "weights " * 1000
WEIGHTS = "adapter_model.safetensors"


@pytest.fixture
def record(registry: ObjectRegistry, new_draft: Callable[..., Draft], name: AdapterName) -> Record:
    return registry.publish(new_draft(CONTENT), name=name, author="ana")


@pytest.fixture
def cache(tmp_path: Path, registry: ObjectRegistry) -> Cache:
    return Cache(tmp_path / "cache", registry)


def swap_blob(registry: ObjectRegistry, record: Record, path: str, value: bytes) -> None:
    entry = next(f for f in record.manifest.files if f.path == path)
    key = f"t/acme/blobs/sha256/{entry.sha256[:2]}/{entry.sha256}"
    registry.store.delete(key)
    registry.store.create(key, value)


def test_a_version_is_fetched_once(cache: Cache, record: Record) -> None:
    assert not cache.is_present(record)
    folder = cache.fetch(record)
    assert (folder / WEIGHTS).read_text() == CONTENT
    assert cache.is_present(record)
    before = (folder / WEIGHTS).stat().st_ino
    assert cache.fetch(record) == folder == cache.path(record)
    assert (folder / WEIGHTS).stat().st_ino == before
    assert sorted(p.name for p in folder.iterdir()) == ["adapter_config.json", WEIGHTS]


def test_two_versions_of_one_digest_share_a_folder(
    cache: Cache, registry: ObjectRegistry, record: Record, new_draft: Callable[..., Draft], name: AdapterName
) -> None:
    again = registry.publish(new_draft(CONTENT), name=name, author="ana")
    assert again.version == 2
    assert cache.fetch(again) == cache.fetch(record)


def test_what_was_deleted_is_fetched_again(cache: Cache, record: Record, tmp_path: Path) -> None:
    folder = cache.fetch(record)
    kept = (folder / "adapter_config.json").stat().st_ino
    (folder / WEIGHTS).unlink()
    assert not cache.is_present(record)
    assert (cache.fetch(record) / WEIGHTS).read_text() == CONTENT
    assert (folder / "adapter_config.json").stat().st_ino == kept  # files in use stay where they are
    (folder / WEIGHTS).write_text("cut")
    assert (cache.fetch(record) / WEIGHTS).read_text() == CONTENT
    shutil.rmtree(folder)
    assert (cache.fetch(record) / WEIGHTS).read_text() == CONTENT
    shutil.rmtree(cache.root)
    assert (cache.fetch(record) / WEIGHTS).read_text() == CONTENT
    assert list((cache.root / "tmp").iterdir()) == []


def test_wrong_bytes_never_reach_the_cache(cache: Cache, registry: ObjectRegistry, record: Record) -> None:
    for wrong in (CONTENT.replace("w", "W"), CONTENT[:-1], ""):
        swap_blob(registry, record, WEIGHTS, wrong.encode())
        with pytest.raises(IntegrityError):
            cache.fetch(record)
        assert not cache.path(record).exists()
        assert not cache.is_present(record)
        assert list((cache.root / "tmp").iterdir()) == []


def test_wrong_bytes_do_not_mend_either(cache: Cache, registry: ObjectRegistry, record: Record) -> None:
    (cache.fetch(record) / WEIGHTS).unlink()
    swap_blob(registry, record, WEIGHTS, b"wrong")
    with pytest.raises(IntegrityError):
        cache.fetch(record)
    assert not (cache.path(record) / WEIGHTS).exists()


def test_a_lost_blob_is_said(cache: Cache, registry: ObjectRegistry, record: Record) -> None:
    for key in registry.store.keys("t/acme/blobs/"):
        registry.store.delete(key)
    with pytest.raises(NotFound, match="not in the registry"):
        cache.fetch(record)
    assert not cache.path(record).exists()


def test_many_threads_may_fetch_and_mend_at_once(cache: Cache, record: Record) -> None:
    with ThreadPoolExecutor(8) as pool:
        assert len(set(pool.map(lambda _: cache.fetch(record), range(16)))) == 1
        (cache.path(record) / WEIGHTS).unlink()
        list(pool.map(lambda _: cache.fetch(record), range(16)))
    assert (cache.path(record) / WEIGHTS).read_text() == CONTENT
    assert list((cache.root / "tmp").iterdir()) == []


def test_a_cache_that_cannot_be_written_is_said(tmp_path: Path, registry: ObjectRegistry, record: Record) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(StorageError) as refused:
        Cache(tmp_path / "file", registry).fetch(record)
    assert str(tmp_path / "file") in refused.value.what


def test_a_folder_is_pulled_whole_and_overwrites_nothing(
    registry: ObjectRegistry, record: Record, tmp_path: Path
) -> None:
    target = tmp_path / "new" / "folder"
    fetch_folder(registry, record, target)
    assert (target / WEIGHTS).read_text() == CONTENT
    with pytest.raises(AlreadyExists):
        fetch_folder(registry, record, target)
    (tmp_path / "empty").mkdir()
    fetch_folder(registry, record, tmp_path / "empty")
    assert (tmp_path / "empty" / WEIGHTS).read_text() == CONTENT
    (tmp_path / "file").write_text("mine")
    with pytest.raises(AlreadyExists):
        fetch_folder(registry, record, tmp_path / "file")
    assert (tmp_path / "file").read_text() == "mine"
    assert sorted(p.name for p in target.parent.iterdir()) == ["folder"]
    swap_blob(registry, record, WEIGHTS, b"wrong")
    with pytest.raises(IntegrityError):
        fetch_folder(registry, record, tmp_path / "other")
    assert not (tmp_path / "other").exists()
