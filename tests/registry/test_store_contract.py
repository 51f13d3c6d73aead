"""What every Store promises (adapterhub.registry.store): run against every backend."""

from __future__ import annotations

import hashlib
import io
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from adapterhub.errors import AdapterError, AlreadyExists, IntegrityError, InvalidName, NotFound
from adapterhub.registry import Store
from adapterhub.registry.doctor import WRITERS, prove
from adapterhub.registry.local import LocalStore
from adapterhub.registry.memory import MemoryStore
from adapterhub.registry.store import MAX_VALUE

BYTES = bytes(range(256)) * 10_000
SHA256 = hashlib.sha256(BYTES).hexdigest()


def put(store: Store, key: str, data: bytes = BYTES, *, size: int = len(BYTES), sha256: str = SHA256) -> None:
    store.create_file(key, io.BytesIO(data), size=size, sha256=sha256)


def test_what_was_created_is_read_listed_and_there(store: Store) -> None:
    store.create("a/b", b"1")
    assert store.read("a/b") == b"1"
    assert store.exists("a/b")
    assert store.keys("a/") == ["a/b"]
    with store.open("a/b") as stream:
        assert stream.read() == b"1"


def test_empty_values_are_values(store: Store) -> None:
    store.create("a/empty", b"")
    assert store.read("a/empty") == b""
    assert store.exists("a/empty")


def test_a_key_is_created_once(store: Store) -> None:
    store.create("a/b", b"first")
    with pytest.raises(AlreadyExists):
        store.create("a/b", b"second")
    assert store.read("a/b") == b"first"


def test_of_many_writers_one_wins(store: Store) -> None:
    def write(writer: int) -> bool:
        try:
            store.create("a/race", str(writer).encode())
        except AlreadyExists:
            return False
        return True

    with ThreadPoolExecutor(16) as pool:
        won = [writer for writer, success in enumerate(pool.map(write, range(64))) if success]
    assert [str(writer).encode() for writer in won] == [store.read("a/race")]


def test_what_is_not_there_is_not_found(store: Store) -> None:
    store.create("a/b", b"1")
    for key in ("a", "a/c", "a/b/c", "x"):
        assert not store.exists(key)
        with pytest.raises(NotFound):
            store.read(key)
        with pytest.raises(NotFound):
            store.open(key)
    assert store.keys("x/") == []
    assert store.folders("x/") == []
    assert store.folders("a/b/") == []


def test_files_are_checked_on_their_way_in(store: Store) -> None:
    put(store, "a/blob")
    with store.open("a/blob") as stream:
        assert stream.read() == BYTES


@pytest.mark.parametrize("data", [BYTES[:-1], BYTES + b"x", b"", BYTES[:-1] + b"x"])
def test_other_bytes_than_announced_leave_no_key(store: Store, data: bytes) -> None:
    with pytest.raises(AdapterError):
        put(store, "a/blob", data)
    assert not store.exists("a/blob")
    assert store.keys("a/") == []


def test_a_file_that_is_there_is_not_read_again(store: Store) -> None:
    put(store, "a/blob")
    put(store, "a/blob", b"never looked at")
    assert store.read("a/blob") == BYTES


def test_many_may_bring_the_same_file_at_once(store: Store) -> None:
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(lambda _: put(store, "a/blob"), range(16)))
    assert store.read("a/blob") == BYTES


def test_a_stream_starts_where_it_is_told(store: Store) -> None:
    put(store, "a/blob")
    with store.open("a/blob", offset=1000) as stream:
        assert stream.read() == BYTES[1000:]
    with store.open("a/blob", offset=len(BYTES)) as stream:
        assert stream.read() == b""


def test_entries_tell_size_and_age(store: Store) -> None:
    for key in ("a/1", "a/b/2"):
        store.create(key, key.encode())
    found = list(store.entries("a/"))
    assert [(entry.key, entry.size) for entry in found] == [("a/1", 3), ("a/b/2", 5)]
    assert all(abs(entry.modified - time.time()) < 3600 for entry in found)
    assert list(store.entries("x/")) == []


def test_several_keys_are_deleted_at_once(store: Store) -> None:
    for n in range(5):
        store.create(f"a/{n}", b"")
    store.delete(*(f"a/{n}" for n in range(4)), "never/there")
    assert store.keys("a/") == ["a/4"]
    store.delete()


def test_a_prefix_is_cleared_and_nothing_beside_it(store: Store) -> None:
    for key in ("a/b/1", "a/b/c/2", "a/3", "ab/4"):
        store.create(key, b"")
    put(store, "a/blob")
    store.clear("a/")
    assert store.keys("a/") == []
    assert store.folders("a/") == []
    assert store.keys("ab/") == ["ab/4"]
    store.clear("a/")
    store.create("a/b/1", b"again")
    assert store.keys("a/") == ["a/b/1"]


def test_what_is_finished_is_not_swept(store: Store) -> None:
    store.create("a/b", b"1")
    put(store, "a/blob")
    assert store.sweep(older_than=-60) == 0
    assert store.keys("a/") == ["a/b", "a/blob"]


def test_what_no_record_can_be_is_not_read(store: Store) -> None:
    large = bytes(MAX_VALUE + 1)
    store.create_file("a/large", io.BytesIO(large), size=len(large), sha256=hashlib.sha256(large).hexdigest())
    with pytest.raises(IntegrityError, match="too large"):
        store.read("a/large")
    with store.open("a/large", offset=MAX_VALUE) as stream:
        assert stream.read() == b"\0"


def test_folders_are_the_next_part(store: Store) -> None:
    for key in ("t/b/x/1", "t/b/y", "t/a/z", "t/file", "u/c/1"):
        store.create(key, b"")
    assert store.folders("t/") == ["a", "b"]
    assert store.folders("t/b/") == ["x"]


def test_a_prefix_ends_where_it_ends(store: Store) -> None:
    store.create("t/bot/1", b"")
    store.create("t/bot2/1", b"")
    assert store.keys("t/bot/") == ["t/bot/1"]


def test_deleted_keys_are_gone_and_deleting_twice_is_fine(store: Store) -> None:
    store.create("a/b", b"1")
    store.delete("a/b")
    store.delete("a/b")
    store.delete("never/there")
    assert not store.exists("a/b")
    assert store.keys("a/") == []


@pytest.mark.parametrize("key", ["", "/a", "a/", "a//b", "../a", "a/../b", "a/.", "a\0b", "a\\b"])
def test_keys_that_could_be_other_paths_are_refused(store: Store, key: str) -> None:
    with pytest.raises(InvalidName):
        store.create(key, b"")
    with pytest.raises(InvalidName):
        store.read(key)
    with pytest.raises(InvalidName):
        store.exists(key)
    with pytest.raises(InvalidName):
        put(store, key)


parts = st.text(alphabet="ab-.0z", min_size=1, max_size=3).filter(lambda p: p not in {".", ".."})
keys = st.lists(parts, min_size=1, max_size=3).map("/".join)


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.data())
def test_keys_come_in_order_and_in_pages(tmp_path_factory: pytest.TempPathFactory, data: st.DataObject) -> None:
    """A folder and memory list alike: by the whole key, as object stores do."""
    wanted = data.draw(st.sets(keys, max_size=12))
    clash = {key for key in wanted if any(other.startswith(key + "/") for other in wanted)}  # a file and a folder
    wanted -= clash
    after, limit = data.draw(keys | st.just("")), data.draw(st.none() | st.integers(0, 5))
    for store in (MemoryStore(), LocalStore(tmp_path_factory.mktemp("store") / "root")):
        for key in wanted:
            store.create(f"p/{key}", b"")
        bound = f"p/{after}" if after else ""
        assert (
            store.keys("p/", after=bound, limit=limit) == sorted(f"p/{k}" for k in wanted if f"p/{k}" > bound)[:limit]
        )


def test_the_doctor_proves_it_and_cleans_up(store: Store) -> None:
    proofs = prove(store)
    assert len(proofs) == 5
    assert any(str(WRITERS) in proof.promise for proof in proofs)
    assert store.keys("doctor/") == []


def test_the_url_opens_the_same_store(tmp_path: Path) -> None:
    from adapterhub.registry import open_store

    for url in (f"{(tmp_path / 'a b').as_uri()}", str(tmp_path / "plain"), "memory://shared"):
        open_store(url).create("a/b", b"1")
        assert open_store(open_store(url).url).read("a/b") == b"1"
