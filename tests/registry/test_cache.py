from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import BinaryIO

import pytest

from adapterhub.errors import AlreadyExists, IntegrityError, NotFound, StorageError
from adapterhub.manifest import Record
from adapterhub.refs import AdapterName
from adapterhub.registry import Cache, Draft, ObjectRegistry, fetch_folder
from adapterhub.registry.local import LocalStore

CONTENT = "weights " * 1000
WEIGHTS = "adapter_model.safetensors"


@pytest.fixture
def store(tmp_path: Path) -> LocalStore:
    """One kind is enough: what every kind must do to be fetched from is in the contracts."""
    return LocalStore(tmp_path / "registry")


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


# ── killed, crowded, full ────────────────────────────────────────────────────────────────────────────────────────

PULLER = """
import os, resource, signal, sys
from pathlib import Path
from adapterhub.errors import StorageError
from adapterhub.refs import AdapterRef
from adapterhub.registry import Cache, open_registry

url, root, how = sys.argv[1:]
registry = open_registry(url)
told = []

def progress(size):
    told.append(size)
    if how == "kill" and sum(told) > 2_000_000:
        os.kill(os.getpid(), signal.SIGKILL)

if how == "full":
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (2_500_000, 2_500_000))
try:
    Cache(Path(root), registry).fetch(registry.resolve(AdapterRef.parse("acme/support@1")).record, progress=progress)
except StorageError as error:
    print(error.why, error.hint)
else:
    print(sum(told))
"""
LARGE = "weights " * 500_000  # 4 MB: several steps


def puller(store: LocalStore, root: Path, how: str) -> subprocess.Popen[str]:
    return subprocess.Popen([sys.executable, "-c", PULLER, store.url, root, how], stdout=subprocess.PIPE, text=True)


@pytest.fixture
def large(tmp_path: Path, new_draft: Callable[..., Draft], name: AdapterName) -> tuple[Watched, Record]:
    store = Watched(tmp_path / "large")
    record = ObjectRegistry(store).publish(new_draft(LARGE), name=name, author="ana")
    store.opened.clear()
    return store, record


class Watched(LocalStore):
    """Keeps in mind from where files were read."""

    def __init__(self, root: Path) -> None:
        super().__init__(root)
        self.opened: list[int] = []

    def open(self, key: str, *, offset: int = 0) -> BinaryIO:
        self.opened.append(offset)
        return super().open(key, offset=offset)


@pytest.mark.parametrize("how", ["kill", "full"])
def test_a_broken_pull_goes_on_where_it_stopped(large: tuple[Watched, Record], tmp_path: Path, how: str) -> None:
    store, record = large
    process = puller(store, tmp_path / "cache", how)
    said, _ = process.communicate(timeout=60)
    assert process.returncode == (-signal.SIGKILL if how == "kill" else 0)
    assert how == "kill" or "ulimit" in said
    cache = Cache(tmp_path / "cache", ObjectRegistry(store))
    assert not cache.path(record).exists()
    assert (cache.fetch(record) / WEIGHTS).read_text() == LARGE
    assert max(store.opened) >= 2_000_000  # not from the start
    assert list((cache.root / "tmp").glob("*")) == []


def test_processes_that_fill_one_cache_transfer_each_byte_once(large: tuple[Watched, Record], tmp_path: Path) -> None:
    store, record = large
    processes = [puller(store, tmp_path / "cache", "whole") for _ in range(3)]
    transferred = [int(process.communicate(timeout=60)[0]) for process in processes]
    assert sorted(transferred) == [0, 0, record.manifest.size]


def test_threads_that_fill_one_cache_transfer_each_byte_once(large: tuple[Watched, Record], tmp_path: Path) -> None:
    store, record = large
    caches = [Cache(tmp_path / "cache", ObjectRegistry(store)) for _ in range(8)]
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(lambda cache: cache.fetch(record), caches))
    assert len(store.opened) == len(record.manifest.files)


def test_a_pull_into_a_folder_goes_on_too(large: tuple[Watched, Record], tmp_path: Path) -> None:
    store, record = large
    work = tmp_path / f".mine.{record.digest[7:19]}"
    work.mkdir()
    (work / WEIGHTS).write_text(LARGE[:1000])
    (work / "adapter_model.bin").write_text("was never published")
    fetch_folder(ObjectRegistry(store), record, tmp_path / "mine")
    assert (tmp_path / "mine" / WEIGHTS).read_text() == LARGE
    assert 1000 in store.opened
    assert sorted(p.name for p in (tmp_path / "mine").iterdir()) == ["adapter_config.json", WEIGHTS]
    assert list(tmp_path.glob(".mine*")) == []


def test_what_cannot_fit_is_refused_before_it_begins(cache: Cache, record: Record) -> None:
    files = tuple(replace(f, size=2**60) for f in record.manifest.files)
    manifest = replace(record.manifest, files=files, read_from=None)
    with pytest.raises(StorageError, match="does not fit") as full:
        cache.fetch(replace(record, manifest=manifest, digest=manifest.digest))
    assert "free some space" in full.value.hint


# ── tampered with ────────────────────────────────────────────────────────────────────────────────────────────────


def other_bytes(path: Path) -> None:
    path.write_text(CONTENT.replace("w", "W"))


def other_bytes_and_the_old_time(path: Path) -> None:
    before = path.stat()
    other_bytes(path)
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))


def another_file_in_its_place(path: Path) -> None:
    other_bytes(path.with_name("new"))
    path.with_name("new").replace(path)


def a_link(path: Path) -> None:
    path.unlink()
    path.symlink_to("/dev/null")


def a_link_to_the_right_bytes(path: Path) -> None:
    path.rename(path.parents[3] / "elsewhere")
    path.symlink_to(path.parents[3] / "elsewhere")


def a_folder(path: Path) -> None:
    path.unlink()
    path.mkdir()


@pytest.mark.parametrize(
    "tamper",
    [other_bytes, other_bytes_and_the_old_time, another_file_in_its_place, a_link, a_link_to_the_right_bytes, a_folder],
)
@pytest.mark.parametrize("same_process", [True, False])
def test_what_was_changed_in_the_cache_is_never_used(
    cache: Cache, registry: ObjectRegistry, record: Record, tamper: Callable[[Path], None], same_process: bool
) -> None:
    path = cache.fetch(record) / WEIGHTS
    tamper(path)
    second = cache if same_process else Cache(cache.root, registry)
    assert second.fetch(record) / WEIGHTS == path
    assert path.read_text() == CONTENT
    assert not path.is_symlink()


def test_what_nobody_published_is_taken_out(
    cache: Cache, record: Record, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    folder = cache.fetch(record)
    (folder / "adapter_model.bin").write_text("pickled")
    (tmp_path / "others").mkdir()
    (tmp_path / "others" / "kept").touch()
    (folder / "linked").symlink_to(tmp_path / "others")
    cache.fetch(record)
    assert sorted(p.name for p in folder.iterdir()) == ["adapter_config.json", WEIGHTS]
    assert (tmp_path / "others" / "kept").exists()
    assert "adapter_model.bin was not published" in caplog.text


def test_a_file_is_hashed_once_a_process(cache: Cache, registry: ObjectRegistry, record: Record) -> None:
    folder = cache.fetch(record)
    reads: list[str] = []
    looking = True

    def hook(event: str, args: tuple[object, ...]) -> None:
        if event == "open" and looking:
            reads.append(str(args[0]))

    sys.addaudithook(hook)  # for ever
    second = Cache(cache.root, registry)
    for _ in range(3):
        second.fetch(record)
    looking = False
    assert len([path for path in reads if path.startswith(str(folder))]) == len(record.manifest.files)


def test_a_version_can_be_forgotten(cache: Cache, record: Record) -> None:
    cache.fetch(record)
    cache.forget(record)
    assert not cache.path(record).exists()
    assert (cache.fetch(record) / WEIGHTS).read_text() == CONTENT


# ── within a budget ──────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.fixture
def three(registry: ObjectRegistry, new_draft: Callable[..., Draft], name: AdapterName, cache: Cache) -> list[Record]:
    """Cached, the first unused for longest."""
    records = [registry.publish(new_draft(f"{n} {CONTENT}"), name=name, author="ana") for n in range(3)]
    for age, record in zip((300, 200, 100), records, strict=True):
        used = time.time() - age
        os.utime(cache.fetch(record), (used, used))
    return records


def present(cache: Cache, records: list[Record]) -> list[bool]:
    return [cache.is_present(record) for record in records]


def test_what_was_not_used_for_longest_goes(cache: Cache, three: list[Record]) -> None:
    size = sum(record.manifest.size for record in three)
    assert cache.trim(size) == []
    assert cache.trim(size - 1) == [cache.path(three[0])]
    assert present(cache, three) == [False, True, True]
    assert (cache.fetch(three[0]) / WEIGHTS).is_file(), "fetched again"


def test_a_fetch_is_a_use(cache: Cache, three: list[Record]) -> None:
    cache.fetch(three[0])
    assert cache.trim(sum(record.manifest.size for record in three) - 1) == [cache.path(three[1])]


def test_what_is_in_use_stays_over_any_limit(cache: Cache, three: list[Record]) -> None:
    cache.fetch(three[2])
    cache.trim(1, keep=[three[0].digest])
    assert present(cache, three) == [True, False, True]
    cache.trim(1, unused_seconds=0)
    assert present(cache, three) == [False, False, False]
    assert cache.trim(1) == []


def test_an_empty_cache_has_nothing_to_trim(cache: Cache) -> None:
    assert cache.trim(1) == []
