"""S3 that goes wrong: what is asked again, what is told, and that no byte and no version is lost by it."""

from __future__ import annotations

import hashlib
import io
from dataclasses import replace
from typing import Any

import pytest

from adapterhub.errors import AdapterError, AdapterHubError, AlreadyExists, NotFound, StorageError, UnsafeStore
from adapterhub.refs import AdapterName
from adapterhub.registry import Draft, ObjectRegistry
from adapterhub.registry.s3 import download, upload
from adapterhub.registry.s3.address import Address
from adapterhub.registry.s3.requests import Patience, Sizes, session
from adapterhub.registry.s3.store import S3Store

pytestmark = pytest.mark.slow

EAGER = Patience(wait=lambda seconds: None)
SHORT = replace(EAGER, connect=0.5, read=0.3)
SMALL = Sizes(large=4 * 2**20, part=2**20, range=2**19)
LARGE_FILE = b"".join(hashlib.sha256(bytes([n])).digest() * 2**14 for n in range(11))
LARGE_SHA256 = hashlib.sha256(LARGE_FILE).hexdigest()
PARTS = -(-len(LARGE_FILE) // SMALL.part)


@pytest.fixture
def store(s3_address: Address, proxy: Any) -> S3Store:
    """Through the proxy."""
    return S3Store(replace(s3_address, endpoint=proxy.url), patience=EAGER, sizes=SMALL)


def impatient(store: S3Store, *, tries: int = SHORT.attempts_timeout) -> S3Store:
    """``tries``: many where an honest answer may take longer than a patience that is short for the test's sake."""
    return S3Store(store.address, patience=replace(SHORT, attempts_timeout=tries, attempts=2 * tries), sizes=SMALL)


def put_large(store: S3Store, source: io.BytesIO | None = None) -> None:
    store.create_file("a/large", source or io.BytesIO(LARGE_FILE), size=len(LARGE_FILE), sha256=LARGE_SHA256)


@pytest.mark.parametrize("kind", ["409", "503", "429", "500"])
def test_a_store_that_is_busy_is_asked_again(store: S3Store, proxy: Any, kind: str) -> None:
    proxy.breaks(kind, "PUT", times=3)
    store.create("a/b", b"1")
    assert store.read("a/b") == b"1"
    assert proxy.count("PUT") == 4


def test_pauses_grow_and_vary() -> None:
    assert all(0 <= Patience().pause(n) <= 0.2 * 2 ** (n - 1) for n in range(1, 6))
    assert Patience().pause(50) <= Patience().longest_pause


def test_patience_ends(store: S3Store, proxy: Any) -> None:
    waits: list[float] = []
    proxy.breaks("503", "PUT", times=100)
    with pytest.raises(StorageError, match="too busy") as refused:
        S3Store(store.address, patience=Patience(wait=waits.append)).create("a/b", b"1")
    assert refused.value.hint
    assert len(waits) == Patience().attempts - 1 == proxy.count("PUT") - 1


def test_a_create_whose_reply_was_lost_finds_itself(store: S3Store, proxy: Any) -> None:
    proxy.breaks("lose", "PUT")
    with pytest.raises(AlreadyExists):
        store.create("a/b", b"mine")
    assert store.read("a/b") == b"mine"


def test_a_publisher_whose_replies_are_lost_publishes_one_version(
    store: S3Store, proxy: Any, new_draft: Any, name: AdapterName
) -> None:
    registry = ObjectRegistry(store, wait=lambda seconds: None)
    drafts: list[Draft] = [new_draft() for _ in range(2)]
    registry.publish(drafts[0], name=name, author="ana")
    for where in ("/blobs/", "/log/", "/d/", "/v/"):
        proxy.breaks("lose", "PUT", where)
    record = registry.publish(drafts[1], name=name, author="ana")
    proxy.breaks("lose", "PUT", "/ch/")
    registry.set_channel(name, "prod", {2: 100}, who="ana")
    proxy.breaks("lose", "PUT", "/ev/")
    registry.add_evaluation(name, 2, suite="gsm8k", metrics={"accuracy": 0.5}, who="ana")
    proxy.breaks("lose", "PUT", "/st/")
    registry.set_status(name, 1, "yanked", who="ana")
    assert (len(registry.evaluations(name, 2)), len(registry.status_log(name, 1))) == (1, 1)
    assert record.version == 2
    assert registry.numbers(name) == [2, 1]
    assert len(registry.channel_log(name, "prod")) == 1


@pytest.mark.parametrize("kind", ["truncate", "lose", "503", "drip", "hang"])
def test_a_body_that_breaks_off_is_read_to_its_end(store: S3Store, proxy: Any, kind: str) -> None:
    value = bytes(range(256)) * 100
    store.create("a/b", value)
    store = impatient(store, tries=50)
    proxy.breaks(kind, "GET", times=2)
    assert store.read("a/b") == value
    proxy.breaks(kind, "GET")
    with store.open("a/b", offset=100) as stream:
        assert b"".join(iter(stream.read, b"")) == value[100:]


def test_a_large_file_goes_in_parts_and_comes_in_ranges(store: S3Store, proxy: Any) -> None:
    for method, kind in (("PUT", "503"), ("PUT", "lose"), ("GET", "503"), ("GET", "truncate"), ("GET", "lose")):
        proxy.breaks(kind, method, "a/large", times=2)
    put_large(store)
    assert proxy.count("PUT", "partNumber") == PARTS + 4
    with store.open("a/large", offset=1) as stream:
        assert b"".join(iter(lambda: stream.read(2**20), b"")) == LARGE_FILE[1:]
    ranges = -(-(len(LARGE_FILE) - 1) // SMALL.range)
    assert proxy.count("GET", "a/large") >= ranges + 6
    with store.open("a/large") as stream:  # left early: nothing stays behind, nothing is raised
        stream.read(SMALL.range + 1)
    proxy.requests.clear()
    put_large(store)
    assert [line.split()[0] for line in proxy.requests] == ["HEAD"]


def test_an_upload_that_was_killed_goes_on_by_part(store: S3Store, proxy: Any) -> None:
    class Killed(io.BytesIO):
        def read(self, size: int | None = -1, /) -> bytes:
            if self.tell() > 3 * SMALL.part:
                raise KeyboardInterrupt
            return super().read(size)

    with pytest.raises(KeyboardInterrupt):
        put_large(store, Killed(LARGE_FILE))
    sent = proxy.count("PUT", "partNumber")
    assert sent == 4
    assert not store.exists("a/large")
    put_large(S3Store(store.address, patience=EAGER, sizes=SMALL))
    assert proxy.count("PUT", "partNumber") == PARTS
    assert proxy.sent < len(LARGE_FILE) + 10_000
    assert store.sweep(older_than=-60) == 0


def test_a_file_of_any_size_has_few_enough_parts() -> None:
    for size in (1, 2**30, 200 * 2**30, 5 * 2**40):
        assert -(-size // upload.part_size(size, usual=8 * 2**20)) <= 10_000
    assert upload.part_size(2**30, usual=8 * 2**20) == 8 * 2**20


def test_parts_of_another_file_are_sent_anew(store: S3Store, proxy: Any) -> None:
    begun = upload.Upload(store._requests, "a/large", size=1, sha256="", conditional=True)
    other = bytes(SMALL.part)
    begun._send_part(begun._begin(), 2, other, None)
    put_large(store)
    assert proxy.count("PUT", "partNumber") == PARTS + 1
    with store.open("a/large", offset=SMALL.part) as stream:
        assert stream.read(100) == LARGE_FILE[SMALL.part :][:100]


def test_a_file_that_is_another_than_announced_leaves_nothing(store: S3Store) -> None:
    for wrong in (LARGE_FILE[:-1], LARGE_FILE + b"x", LARGE_FILE[:-1] + b"x"):
        with pytest.raises(AdapterError, match="others than announced"):
            put_large(store, io.BytesIO(wrong))
    assert not store.exists("a/large")
    assert store.sweep(older_than=-60) == 0


def test_an_upload_that_was_swept_under_us_begins_again(store: S3Store, proxy: Any) -> None:
    proxy.breaks("gone", "PUT", "partNumber=4")
    proxy.breaks("gone", "POST", "uploadId")
    put_large(store)
    assert proxy.count("POST", "uploadId") == 2
    with store.open("a/large") as stream:
        assert b"".join(iter(stream.read, b"")) == LARGE_FILE


def test_what_was_never_finished_is_swept(store: S3Store) -> None:
    upload.Upload(store._requests, "a/large", size=1, sha256="", conditional=True)._begin()
    assert store.sweep(older_than=10**10) == 0
    assert store.sweep(older_than=-60, dry_run=True) == 1
    assert store.sweep(older_than=-60) == 1
    assert store.sweep(older_than=-60) == 0


def test_a_value_that_is_written_again_while_it_is_read_is_an_error(store: S3Store, proxy: Any) -> None:
    put_large(store)
    proxy.breaks("412", "GET", "a/large", times=0)
    with store.open("a/large") as stream:
        proxy.breaks("412", "GET", "a/large")
        with pytest.raises(StorageError, match="written again"):
            while stream.read(2**20):
                pass


def test_deleting_works_where_there_is_no_batch(store: S3Store, proxy: Any) -> None:
    for n in range(3):
        store.create(f"a/{n}", b"")
    proxy.breaks("501", "POST", "delete")
    store.delete("a/0", "a/1")
    assert store.keys("a/") == ["a/2"]


def test_pages_are_followed(store: S3Store, proxy: Any) -> None:
    for n in range(7):
        store.create(f"a/{n}/x", b"")
    store.keys("a/", limit=1)
    assert "max-keys=1&" in proxy.requests[-1] + "&"
    assert store.keys("a/", after="a/2/x", limit=3) == [f"a/{n}/x" for n in (3, 4, 5)]
    assert store.keys("a/", limit=0) == []


@pytest.mark.parametrize(
    ("kind", "says", "hints"),
    [
        ("denied", "no permission", "deploy/iam"),
        ("key", "does not know the access key", "aws sts"),
        ("secret", "secret key", "aws sts"),
        ("skew", "clock", "timedatectl"),
        ("301", "region", "region="),
        ("501", "cannot hold a registry", "single_writer=true"),
        ("507", "full", "ah gc"),
    ],
)
def test_what_the_store_refuses_says_why_and_what_to_type(
    store: S3Store, proxy: Any, kind: str, says: str, hints: str
) -> None:
    proxy.breaks(kind, "PUT", times=10)
    with pytest.raises(StorageError, match=says) as refused:
        store.create("a/b", b"1")
    assert hints in refused.value.hint
    assert proxy.count("PUT") <= EAGER.attempts


def test_what_a_head_cannot_say_a_list_does(store: S3Store, proxy: Any) -> None:
    """Whose listing is limited to a prefix is told 403 for what is not there."""
    proxy.breaks("denied", "HEAD", times=2)
    assert not store.exists("a/b")
    store.create("a/b", b"1")
    assert store.exists("a/b")
    proxy.breaks("denied", "GET", "a/c", times=2)
    with pytest.raises(NotFound):
        store.read("a/c")
    with pytest.raises(NotFound):
        store.open("a/c")
    proxy.breaks("denied", "GET", times=2)
    with pytest.raises(StorageError, match="no permission"):
        store.read("a/b")


def test_a_store_that_hangs_is_not_asked_twice_over(store: S3Store, proxy: Any) -> None:
    proxy.breaks("hang", "HEAD", times=100)
    with pytest.raises(StorageError, match="did not answer in time"):
        impatient(store).exists("a/b")
    assert len(proxy.requests) <= SHORT.attempts_timeout  # one that timed out may not have been read yet


def test_no_bucket(s3_address: Address) -> None:
    with pytest.raises(StorageError, match="no bucket nowhere") as refused:
        S3Store(replace(s3_address, bucket="nowhere"), patience=EAGER, sizes=SMALL).create("a/b", b"1")
    assert refused.value.hint == "aws s3 mb s3://nowhere"


def test_no_credentials(s3_address: Address, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.delenv(name)
    session.cache_clear()
    with pytest.raises(StorageError, match="no credentials") as refused:
        S3Store(s3_address, patience=EAGER, sizes=SMALL).read("a/b")
    assert "AWS_PROFILE" in refused.value.hint
    session.cache_clear()


def test_no_such_profile(s3_address: Address) -> None:
    with pytest.raises(StorageError, match="never-made") as refused:
        S3Store(replace(s3_address, profile="never-made"), patience=EAGER, sizes=SMALL).read("a/b")
    assert "list-profiles" in refused.value.hint


def test_an_endpoint_that_is_down(s3_address: Address) -> None:
    store = S3Store(replace(s3_address, endpoint="http://127.0.0.1:1"), patience=EAGER, sizes=SMALL)
    for action in (lambda: store.read("a/b"), lambda: store.exists("a/b"), lambda: store.keys("a/")):
        with pytest.raises(StorageError, match="cannot be reached") as refused:
            action()
        assert "endpoint=" in refused.value.hint


def test_an_endpoint_that_hangs(store: S3Store, proxy: Any) -> None:
    proxy.breaks("hang", "GET", times=100)
    with pytest.raises(StorageError, match="did not answer in time"):
        impatient(store).read("a/b")
    assert proxy.count("GET") <= SHORT.attempts_timeout


def test_an_endpoint_without_tls(s3_address: Address) -> None:
    store = S3Store(
        replace(s3_address, endpoint=s3_address.endpoint.replace("http:", "https:")), patience=EAGER, sizes=SMALL
    )
    with pytest.raises(StorageError, match="cannot be reached") as refused:
        store.read("a/b")
    assert "AWS_CA_BUNDLE" in refused.value.hint


def test_every_refusal_is_one_of_ours(store: S3Store, proxy: Any) -> None:
    """A server that is no S3 at all."""
    proxy.breaks("garbage", "GET", times=100)
    for action in (lambda: store.keys("a/"), lambda: store.folders("a/")):
        with pytest.raises(AdapterHubError, match="cannot be used"):
            action()


def test_a_store_that_ignores_ranges_is_refused() -> None:
    class Body:
        def close(self) -> None: ...

    with pytest.raises(UnsafeStore, match="cannot be read"):
        download._check_range({"Body": Body(), "ContentLength": 10}, 5, S3Store(Address("models"))._requests)
